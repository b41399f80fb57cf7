//! A server with a scripted model, and a client that writes down what it sees.

mod client;
mod device;
mod model;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use tokenmill::config::{SchedulingPolicy, ServerConfig};
use tokenmill::engine::{Engine, EngineOptions, ModelInfo};
use tokenmill::request::SamplingDefaults;
use tokenmill::runner::StepRunner;
use tokenmill::scheduler::SchedulerParams;
use tokenmill::server;
use tokenmill::telemetry::Metrics;
use tokio::sync::oneshot;

pub use client::{Client, has_answer, read_answer};
pub use device::BreakingDevice;
pub use model::END_OF_TURN;
use model::{Recital, VOCAB_SIZE, text_pipeline};

/// Longest prompt plus output.
pub const MAX_MODEL_LEN: usize = 256;
/// Nothing here should take longer, however busy the machine is.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How to start a server.
pub struct Setup {
    /// What the model says; it ends its turn afterwards.
    pub says: &'static str,
    /// Say it again and again instead of ending the turn.
    pub endless: bool,
    /// Steps wait until the test allows them.
    pub gated: bool,
    /// The step with this number fails.
    pub fails_at: Option<u64>,
    /// `--api-key`
    pub api_keys: &'static [&'static str],
    /// `--max-body-size`
    pub max_body_bytes: u64,
    /// `--max-num-queued-requests`
    pub max_num_queued_requests: usize,
    /// `--max-num-seqs`
    pub max_num_seqs: usize,
    /// `--shutdown-timeout`
    pub shutdown_timeout: Duration,
    /// From the model's generation_config.json.
    pub defaults: SamplingDefaults,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            says: "Hello!",
            endless: false,
            gated: false,
            fails_at: None,
            api_keys: &[],
            max_body_bytes: 64 << 10,
            max_num_queued_requests: 16,
            max_num_seqs: 8,
            shutdown_timeout: PATIENCE,
            defaults: SamplingDefaults::default(),
        }
    }
}

/// A server on a free port of this machine.
pub struct TestServer {
    address: SocketAddr,
    runtime: Option<tokio::runtime::Runtime>,
    permits: Option<Sender<()>>,
    shutdown: Option<oneshot::Sender<()>>,
    stopped: Receiver<std::io::Result<()>>,
}

impl TestServer {
    /// A server whose model says this.
    pub fn saying(says: &'static str) -> TestServer {
        Setup { says, ..Setup::default() }.start()
    }

    /// A client of this server.
    pub fn client(&self) -> Client {
        Client::new(self.address)
    }

    /// Lets a gated model compute this many more steps.
    pub fn allow_steps(&self, steps: usize) {
        let permits = self.permits.as_ref().expect("a gated model");
        (0..steps).for_each(|_| permits.send(()).expect("the model is there"));
    }

    /// Lets a gated model run freely from now on.
    pub fn open_gate(&mut self) {
        self.permits = None;
    }

    /// Asks the server to stop, as a signal would.
    pub fn ask_to_stop(&mut self) {
        let shutdown = self.shutdown.take().expect("asked once");
        shutdown.send(()).expect("the server runs");
    }

    /// Waits until `serve` has returned.
    pub fn wait_until_stopped(&self) {
        let result = self.stopped.recv_timeout(PATIENCE).expect("the server stops");
        result.expect("the server stops without an error");
    }

    /// True once `serve` has returned.
    pub fn has_stopped(&self) -> bool {
        self.stopped.try_recv().is_ok_and(|result| result.is_ok())
    }

    /// The value of a metric, by the beginning of its line.
    pub fn metric(&self, name: &str) -> Option<f64> {
        let text = self.client().get("/metrics").body;
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.rsplit(' ').next()?.parse().ok()
    }

    /// Polls until a metric has a value.
    pub fn wait_for_metric(&self, name: &str, value: f64) {
        wait_until(&format!("{name} is {value}"), || self.metric(name) == Some(value));
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.permits = None;
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Polls until a condition holds.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "still waiting until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

impl Setup {
    /// Starts the server.
    pub fn start(self) -> TestServer {
        let (permits, gate) = channel();
        let gate = self.gated.then_some(gate);
        let runner = Recital::new(self.says, self.endless, gate, self.fails_at);
        let mut server = self.start_with(Box::new(runner));
        server.permits = self.gated.then_some(permits);
        server
    }

    /// Starts the server with a model of another kind.
    pub fn start_with(&self, runner: Box<dyn StepRunner>) -> TestServer {
        let metrics = Arc::new(Metrics::new("scripted", MAX_MODEL_LEN));
        let config = self.server_config();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        let options = self.options(metrics);
        let engine = Engine::start(runner, text_pipeline(), options, runtime.handle());
        let listener =
            runtime.block_on(tokio::net::TcpListener::bind(("127.0.0.1", 0))).expect("a free port");
        let address = listener.local_addr().expect("a bound socket");
        let (shutdown, stop) = oneshot::channel::<()>();
        let (report, stopped) = channel();
        runtime.spawn(async move {
            let result = server::serve(engine, &config, listener, until(stop)).await;
            // The test may be over already.
            let _ = report.send(result);
        });
        TestServer {
            address,
            runtime: Some(runtime),
            permits: None,
            shutdown: Some(shutdown),
            stopped,
        }
    }

    fn options(&self, metrics: Arc<Metrics>) -> EngineOptions {
        let (block_size, num_blocks) = (16, 64);
        let eos_token_ids = vec![END_OF_TURN];
        EngineOptions {
            model: ModelInfo {
                root: "/models/scripted".to_owned(),
                created: 1_700_000_000,
                max_model_len: MAX_MODEL_LEN,
                vocab_size: VOCAB_SIZE,
                eos_token_ids: eos_token_ids.clone(),
                block_size,
                num_blocks,
                defaults: self.defaults.clone(),
            },
            scheduler: SchedulerParams {
                max_num_seqs: self.max_num_seqs,
                max_num_batched_tokens: 512,
                max_model_len: MAX_MODEL_LEN,
                policy: SchedulingPolicy::Fcfs,
                block_size,
                num_blocks,
                enable_prefix_caching: true,
                eos_token_ids,
            },
            max_num_queued_requests: self.max_num_queued_requests,
            step_timeout: PATIENCE,
            metrics,
        }
    }

    fn server_config(&self) -> ServerConfig {
        ServerConfig {
            host: [127, 0, 0, 1].into(),
            port: 0,
            api_keys: self.api_keys.iter().map(|&key| key.to_owned()).collect(),
            served_model_names: vec!["scripted".to_owned(), "org/alias".to_owned()],
            max_body_bytes: self.max_body_bytes,
            max_logprobs: 5,
            shutdown_timeout: self.shutdown_timeout,
            step_timeout: PATIENCE,
            seed: Some(0),
            accepts_priority: false,
        }
    }
}

/// Resolves when the test asks for it; a test that never asks drops the sender at its end.
async fn until(stop: oneshot::Receiver<()>) {
    if stop.await.is_err() {
        std::future::pending::<()>().await;
    }
}
