//! `tokenmill serve`: open the model, say where it is, serve until told to stop.

use std::net::{IpAddr, SocketAddr};

use anyhow::Context;

use super::open::{self, Opened};
use crate::config::{EngineConfig, ServeArgs};
use crate::ops::cpu::physical_cores;
use crate::ops::cuda::{Image, KERNELS};
use crate::{server, telemetry};

/// Serves until SIGTERM or Ctrl-C.
pub fn run(args: ServeArgs) -> anyhow::Result<()> {
    run_with(args, KERNELS)
}

/// The same with other kernels for GPUs than those of this binary.
pub fn run_with(args: ServeArgs, kernels: &'static [Image]) -> anyhow::Result<()> {
    telemetry::init_logging(args.server.log_json);
    let config = EngineConfig::resolve(args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(num_connection_threads(physical_cores()))
        .enable_all()
        .build()
        .context("the runtime cannot start its threads")?;
    // Take the port first: a second server should fail before it loads a model.
    let listener = runtime.block_on(bind(&config))?;
    let address = listener.local_addr().context("the listener has an address")?;
    let opened = open::open_with(&config, kernels, runtime.handle())?;
    announce(&config, &opened, address);
    let stop = server::termination_signal();
    let outcome = runtime.block_on(server::serve(opened.engine, &config.server, listener, stop));
    // Blocking tasks may still tokenize for clients that are gone; they are not worth waiting for.
    runtime.shutdown_background();
    outcome.context("the server stopped")
}

/// Threads that read requests and write events, beside those that compute. They have no core of
/// their own: what a step yields is written while the next begins, and each further thread that
/// wakes for it takes a core from a compute thread that others wait for. One writes a hundred
/// thousand tokens per second.
fn num_connection_threads(num_cores: usize) -> usize {
    num_cores.div_ceil(8).clamp(1, 4)
}

async fn bind(config: &EngineConfig) -> anyhow::Result<tokio::net::TcpListener> {
    let address = SocketAddr::new(config.server.host, config.server.port);
    tokio::net::TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen on {address}; choose another --port (0 picks a free one)")
    })
}

/// Tells a person where the server is and what to try; logs are for machines.
fn announce(config: &EngineConfig, opened: &Opened, address: SocketAddr) {
    let model = &config.server.served_model_names[0];
    let host = match address.ip() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => IpAddr::from([127, 0, 0, 1]),
        IpAddr::V6(_) => IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]),
    };
    let url = format!("http://{}", SocketAddr::new(host, address.port()));
    let key = if config.server.api_keys.is_empty() {
        ""
    } else {
        " \\\n    -H 'Authorization: Bearer YOUR_KEY'"
    };
    println!(
        "tokenmill {} serves {model} on {url}/v1\n\
         \x20 loaded in {:.2} s on {}, context {} tokens\n\
         \x20 memory: {}\n\n\
         Try it:\n\
         \x20 curl {url}/v1/chat/completions{key} \\\n\
         \x20   -H 'Content-Type: application/json' \\\n\
         \x20   -d '{{\"model\": \"{model}\", \"messages\": [{{\"role\": \"user\", \
         \"content\": \"What is the capital of France?\"}}]}}'\n",
        env!("CARGO_PKG_VERSION"),
        opened.load_time.as_secs_f64(),
        opened.backend,
        opened.plan.max_model_len,
        opened.plan,
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_threads_serve_connections_on_any_machine() {
        assert_eq!([1, 2, 16, 64, 256].map(num_connection_threads), [1, 1, 2, 4, 4]);
    }
}
