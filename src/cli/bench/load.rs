//! How prompts are sent: all at once, a few at a time or at a rate. Knows no engine.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::workload::{Random, WorkloadArgs};

/// One finished request.
#[derive(Clone, Debug)]
pub(super) struct RequestTrace {
    /// When it was sent.
    pub sent: Instant,
    /// When each piece of output came; a piece has one token or more.
    pub arrivals: Vec<Instant>,
    /// When the last byte came.
    pub ended: Instant,
    /// Prompt tokens.
    pub num_input_tokens: usize,
    /// Prompt tokens that a prefix cache held, as far as the engine says.
    pub num_cached_tokens: usize,
    /// Generated tokens.
    pub num_output_tokens: usize,
}

/// How fast to send.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    /// Most requests under way.
    pub max_concurrency: Option<usize>,
    /// Requests per second.
    pub rate: Option<f64>,
    /// Of the arrival times.
    pub seed: u64,
}

impl Pace {
    /// The pace that the flags ask for.
    pub fn of(args: &WorkloadArgs, seed: u64) -> Pace {
        Pace { max_concurrency: args.max_concurrency, rate: args.request_rate, seed }
    }
}

/// What came of all requests.
pub(super) struct Outcome {
    /// Those that finished.
    pub traces: Vec<RequestTrace>,
    /// What was wrong with the others.
    pub failures: Vec<anyhow::Error>,
    /// From the first request sent to the last one ended.
    pub duration: Duration,
}

/// Stream of the arrival times, apart from those of prompts.
const ARRIVAL_STREAM: u64 = 1 << 41;

/// Sends every prompt at the pace and waits for all answers.
pub(super) async fn drive<Answer>(
    prompts: Vec<Vec<u32>>,
    pace: Pace,
    send: impl Fn(Vec<u32>) -> Answer,
) -> Outcome
where
    Answer: Future<Output = anyhow::Result<RequestTrace>> + Send + 'static,
{
    let gate = Arc::new(Semaphore::new(pace.max_concurrency.unwrap_or(Semaphore::MAX_PERMITS)));
    let mut arrivals = Random::new(pace.seed, ARRIVAL_STREAM);
    let mut requests = JoinSet::new();
    let started = Instant::now();
    let mut due = started;
    for prompt in prompts {
        if let Some(rate) = pace.rate {
            tokio::time::sleep_until(due.into()).await;
            due += Duration::from_secs_f64(arrivals.gap(rate));
        }
        // The gate is never closed.
        let Ok(permit) = Arc::clone(&gate).acquire_owned().await else { break };
        let answer = send(prompt);
        requests.spawn(async move {
            let trace = answer.await;
            drop(permit);
            trace
        });
    }
    let (mut traces, mut failures) = (Vec::new(), Vec::new());
    while let Some(joined) = requests.join_next().await {
        match joined.context("a request's task ended early").and_then(|trace| trace) {
            Ok(trace) => traces.push(trace),
            Err(error) => failures.push(error),
        }
    }
    Outcome { traces, failures, duration: started.elapsed() }
}

impl Outcome {
    /// The traces, or the first failure when there is any.
    pub fn all(self) -> anyhow::Result<Vec<RequestTrace>> {
        match self.failures.into_iter().next() {
            Some(error) => Err(error),
            None => Ok(self.traces),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn trace(len: usize) -> RequestTrace {
        let now = Instant::now();
        RequestTrace {
            sent: now,
            arrivals: vec![now],
            ended: now,
            num_input_tokens: len,
            num_cached_tokens: 0,
            num_output_tokens: 1,
        }
    }

    #[tokio::test]
    async fn no_more_requests_are_under_way_than_allowed() {
        let (under_way, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let pace = Pace { max_concurrency: Some(3), ..Pace::default() };
        let prompts = (1..=20).map(|len| vec![0; len]).collect();
        let outcome = drive(prompts, pace, |prompt| {
            let (under_way, most) = (Arc::clone(&under_way), Arc::clone(&most));
            async move {
                let now = under_way.fetch_add(1, Ordering::SeqCst) + 1;
                most.fetch_max(now, Ordering::SeqCst);
                tokio::task::yield_now().await;
                under_way.fetch_sub(1, Ordering::SeqCst);
                Ok(trace(prompt.len()))
            }
        })
        .await;
        assert_eq!(most.load(Ordering::SeqCst), 3);
        let total: usize = outcome.traces.iter().map(|trace| trace.num_input_tokens).sum();
        assert_eq!((outcome.traces.len(), total), (20, 210));
    }

    #[tokio::test]
    async fn failures_are_kept_apart() {
        let prompts = vec![vec![1], vec![1, 2], vec![1, 2, 3]];
        let outcome = drive(prompts, Pace::default(), |prompt| async move {
            anyhow::ensure!(prompt.len() != 2, "refused");
            Ok(trace(prompt.len()))
        })
        .await;
        assert_eq!((outcome.traces.len(), outcome.failures.len()), (2, 1));
        assert_eq!(outcome.all().unwrap_err().to_string(), "refused");
    }
}
