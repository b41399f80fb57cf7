//! Serving until told to stop, and stopping without cutting anyone off.

use std::future::{Future, IntoFuture};
use std::io;
use std::time::Duration;

use axum::serve::ListenerExt;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use super::router::router;
use crate::config::ServerConfig;
use crate::engine::Engine;

/// After the engine has drained, connections get this long to take their last bytes.
const LINGER: Duration = Duration::from_secs(5);

/// Serves until `shutdown` resolves; then refuses new requests, lets running ones finish for
/// up to `config.shutdown_timeout`, and returns.
pub async fn serve(
    engine: Engine,
    config: &ServerConfig,
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let router = router(engine.clone(), config);
    let (close, closing) = oneshot::channel::<()>();
    // Events are small and must leave at once.
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY was refused");
        }
    });
    let server = axum::serve(listener, router).with_graceful_shutdown(async {
        // An error means that `close` was dropped, which also means: stop.
        let _ = closing.await;
    });
    let mut server = tokio::spawn(server.into_future());
    tokio::select! {
        result = &mut server => return result.unwrap_or_else(|panic| Err(io::Error::other(panic))),
        () = shutdown => {}
    }
    let timeout = config.shutdown_timeout;
    tracing::info!(active = engine.num_active(), ?timeout, "draining: no new requests are taken");
    // The listener stays open meanwhile, so that probes and late clients get an answer.
    let aborted = engine.drain(timeout).await;
    if aborted > 0 {
        tracing::warn!(aborted, "requests were cut off by the shutdown timeout");
    }
    let _ = close.send(());
    if tokio::time::timeout(LINGER, &mut server).await.is_err() {
        tracing::warn!("connections were still open after {LINGER:?}");
        server.abort();
    }
    tracing::info!("stopped");
    Ok(())
}

/// Resolves on SIGTERM or SIGINT. A second signal ends the process at once.
pub async fn termination_signal() {
    let first = next_signal().await;
    tracing::info!(signal = first, "shutting down; a second signal ends the process at once");
    tokio::spawn(async {
        let second = next_signal().await;
        tracing::warn!(signal = second, "ended by a second signal");
        std::process::exit(1);
    });
}

async fn next_signal() -> &'static str {
    let (terminate, interrupt) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    let (Ok(mut terminate), Ok(mut interrupt)) = (terminate, interrupt) else {
        tracing::error!("signals cannot be received; stop the process with SIGKILL");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}
