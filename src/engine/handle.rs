//! The handle: cloneable, `Send`, and the only way to the engine thread.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::Sender;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::delivery::Courier;
use super::step::{Command, StepLoop};
use super::watch::StepWatch;
use super::{EngineError, Generation, intake};
use crate::request::{GenerateRequest, RequestId, SamplingDefaults};
use crate::runner::StepRunner;
use crate::scheduler::{Scheduler, SchedulerParams};
use crate::telemetry::{CacheConfigReport, Metrics};
use crate::text::TextPipeline;

/// Facts about the served model.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// Where the model came from, for `/v1/models`.
    pub root: String,
    /// When it was loaded, in Unix seconds.
    pub created: u64,
    /// Longest prompt plus output in tokens.
    pub max_model_len: usize,
    /// Number of token ids, which bounds every id in a request.
    pub vocab_size: usize,
    /// The model's own end tokens.
    pub eos_token_ids: Vec<u32>,
    /// Tokens per KV block.
    pub block_size: usize,
    /// KV blocks in the pool.
    pub num_blocks: usize,
    /// The model's own sampling defaults.
    pub defaults: SamplingDefaults,
}

/// What the engine needs beside a runner and a text pipeline.
pub struct EngineOptions {
    /// Facts about the model.
    pub model: ModelInfo,
    /// How to schedule.
    pub scheduler: SchedulerParams,
    /// Most requests waiting for their first step.
    pub max_num_queued_requests: usize,
    /// After this a step of a device hangs.
    pub step_timeout: Duration,
    /// Where to report.
    pub metrics: Arc<Metrics>,
}

/// Whether the engine takes requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineStatus {
    /// Yes.
    Ready,
    /// Not any more; running requests finish.
    Draining,
    /// It failed; the text says how.
    Dead(Arc<str>),
}

/// What handle and engine thread share.
pub(super) struct Shared {
    pub model: ModelInfo,
    pub metrics: Arc<Metrics>,
    pub max_num_queued_requests: usize,
    /// Requests accepted but not yet in any step.
    pub num_queued: AtomicUsize,
    /// Requests accepted and not yet ended; watched by `drain`.
    pub num_active: watch::Sender<usize>,
    /// The step that a device computes.
    pub watch: StepWatch,
    // A status changes at most twice in a life; readers hold the lock for a clone.
    status: Mutex<EngineStatus>,
}

impl Shared {
    /// As it was set; but while a device hangs, the engine is as good as dead.
    pub fn status(&self) -> EngineStatus {
        let status = self.status.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        match status {
            EngineStatus::Dead(_) => status,
            _ => self.watch.overdue().map_or(status, EngineStatus::Dead),
        }
    }

    /// Moves forward only: a dead engine stays dead.
    pub fn set_status(&self, status: EngineStatus) {
        let mut current = self.status.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !matches!(*current, EngineStatus::Dead(_)) {
            *current = status;
        }
    }

    /// Takes a place in the queue, unless it is full.
    pub fn enqueue(&self) -> Result<(), EngineError> {
        let limit = self.max_num_queued_requests;
        self.num_queued
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| (n < limit).then_some(n + 1))
            .map_err(|_| EngineError::QueueFull { limit })?;
        self.num_active.send_modify(|n| *n += 1);
        Ok(())
    }

    /// Gives a place in the queue back: the request runs now.
    pub fn dequeue(&self) {
        self.num_queued.fetch_sub(1, Ordering::AcqRel);
    }

    /// A request has ended, perhaps while it was still queued.
    pub fn release(&self, was_queued: bool) {
        if was_queued {
            self.dequeue();
        }
        self.num_active.send_modify(|n| *n -= 1);
    }
}

/// A running engine. Clones share it; when the last is dropped the engine thread ends.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
    text: Arc<TextPipeline>,
    commands: Sender<Command>,
}

impl Engine {
    /// Starts the engine thread. `runtime` is where generations are polled: tokens are delivered
    /// by a task there.
    pub fn start(
        runner: Box<dyn StepRunner>,
        text: Arc<TextPipeline>,
        options: EngineOptions,
        runtime: &Handle,
    ) -> Engine {
        let EngineOptions { model, scheduler, max_num_queued_requests, step_timeout, metrics } =
            options;
        metrics.record_cache_config(&CacheConfigReport {
            block_size: scheduler.block_size,
            num_blocks: scheduler.num_blocks,
            enable_prefix_caching: scheduler.enable_prefix_caching,
        });
        let shared = Arc::new(Shared {
            model,
            metrics,
            max_num_queued_requests,
            num_queued: AtomicUsize::new(0),
            num_active: watch::Sender::new(0),
            watch: StepWatch::new(step_timeout),
            status: Mutex::new(EngineStatus::Ready),
        });
        let (sender, receiver) = crossbeam_channel::unbounded();
        let step_loop = StepLoop::new(
            Scheduler::new(scheduler),
            runner,
            receiver,
            Arc::clone(&shared),
            Courier::start(runtime),
        );
        std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || step_loop.run())
            .expect("the system can start one thread");
        Engine { shared, text, commands: sender }
    }

    /// Tokenizes and admits a request.
    pub async fn submit(&self, request: GenerateRequest) -> Result<Generation, EngineError> {
        match self.shared.status() {
            EngineStatus::Ready => {}
            EngineStatus::Draining => return Err(EngineError::Draining),
            EngineStatus::Dead(reason) => return Err(EngineError::Dead(reason)),
        }
        // Refuse before tokenizing: a flooded server must not spend its cores on refusals.
        self.shared
            .enqueue()
            .inspect_err(|_| self.shared.metrics.record_rejection("queue_full"))?;
        let place = QueuePlace { shared: &self.shared, taken: false };
        let text = Arc::clone(&self.text);
        let max_model_len = self.shared.model.max_model_len;
        let vocab_size = self.shared.model.vocab_size;
        let (tokenized, output) = tokio::task::spawn_blocking(move || {
            intake::tokenize(&text, request, max_model_len, vocab_size)
        })
        .await
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        let (generation, command) =
            intake::connect(tokenized, &output, &self.text, self.commands.clone(), max_model_len);
        if self.commands.send(command).is_err() {
            let reason = match self.shared.status() {
                EngineStatus::Dead(reason) => reason,
                _ => "its thread has ended".into(),
            };
            return Err(EngineError::Dead(reason));
        }
        place.hand_over();
        Ok(generation)
    }

    /// Ends a request by its id; unknown ids are ignored.
    pub fn abort(&self, id: &RequestId) {
        // A failed send means that the thread is gone, and every request with it.
        let _ = self.commands.send(Command::Abort { id: id.clone(), index: None });
    }

    /// Forgets every cached prefix that no running request uses.
    pub fn reset_prefix_cache(&self) {
        let _ = self.commands.send(Command::ResetPrefixCache);
    }

    /// Facts about the model.
    pub fn model(&self) -> &ModelInfo {
        &self.shared.model
    }

    /// Tokenizer and template.
    pub fn text(&self) -> &Arc<TextPipeline> {
        &self.text
    }

    /// Metrics.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.shared.metrics
    }

    /// Whether the engine takes requests.
    pub fn status(&self) -> EngineStatus {
        self.shared.status()
    }

    /// Requests accepted and not yet ended.
    pub fn num_active(&self) -> usize {
        *self.shared.num_active.borrow()
    }

    /// Refuses new requests, waits up to `timeout` for the running ones, aborts the rest.
    /// Returns how many had to be aborted.
    pub async fn drain(&self, timeout: Duration) -> usize {
        self.shared.set_status(EngineStatus::Draining);
        let mut num_active = self.shared.num_active.subscribe();
        // The sender lives in `shared`, so waiting cannot fail.
        if tokio::time::timeout(timeout, num_active.wait_for(|&n| n == 0)).await.is_ok() {
            return 0;
        }
        let aborted = *num_active.borrow();
        let _ = self.commands.send(Command::AbortAll);
        let _ =
            tokio::time::timeout(Duration::from_secs(5), num_active.wait_for(|&n| n == 0)).await;
        aborted
    }
}

/// Gives the place in the queue back when a request ends before the engine thread has it.
struct QueuePlace<'a> {
    shared: &'a Shared,
    taken: bool,
}

impl QueuePlace<'_> {
    fn hand_over(mut self) {
        self.taken = true;
    }
}

impl Drop for QueuePlace<'_> {
    fn drop(&mut self) {
        if !self.taken {
            self.shared.release(true);
        }
    }
}
