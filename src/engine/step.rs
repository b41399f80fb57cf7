//! The engine thread: plan → execute → commit → emit, and nothing else.
//!
//! Where a device computes by itself, what a step yielded is emitted, and the step after the next
//! planned, while it computes the next: so it waits only for what depends on its own results.
//!
//! Owns the scheduler and the runner by value; the only inputs are commands, the only outputs
//! token events and metrics. A failed or panicking step ends every request with the reason
//! and marks the engine dead.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError};
use tokio::sync::mpsc;
use tracing::{debug, error};

use super::delivery::{Courier, Handover};
use super::handle::{EngineStatus, Shared};
use crate::output::{FinishReason, TokenEvent};
use crate::request::{RequestId, TokenizedRequest};
use crate::runner::{RunnerError, StepRunner};
use crate::scheduler::Scheduler;
use crate::telemetry::{RequestReport, StepReport};

/// What a handle or a stream asks of the engine thread.
pub(super) enum Command {
    /// Admit a request.
    Submit(Box<Submission>),
    /// End a request, or one of its continuations.
    Abort { id: RequestId, index: Option<u32> },
    /// End every request.
    AbortAll,
    /// Forget cached prefixes.
    ResetPrefixCache,
}

/// A request with the way back to its client.
pub(super) struct Submission {
    pub request: TokenizedRequest,
    pub events: mpsc::Sender<TokenEvent>,
    pub arrived: Instant,
}

/// What the thread remembers of a request until it ends.
struct Active {
    events: mpsc::Sender<TokenEvent>,
    num_open: u32,
    timeline: Timeline,
    report: RequestReport,
}

/// Moments in the life of a request.
struct Timeline {
    arrived: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

/// The engine thread's state.
pub(super) struct StepLoop {
    scheduler: Scheduler,
    runner: Box<dyn StepRunner>,
    commands: Receiver<Command>,
    clients: Clients,
    /// Of the last step, for the time in which a device computes the next.
    unsent: Vec<TokenEvent>,
}

/// Those whose requests are being served.
struct Clients {
    shared: Arc<Shared>,
    courier: Courier,
    active: HashMap<RequestId, Active>,
}

impl StepLoop {
    pub fn new(
        scheduler: Scheduler,
        runner: Box<dyn StepRunner>,
        commands: Receiver<Command>,
        shared: Arc<Shared>,
        courier: Courier,
    ) -> StepLoop {
        let clients = Clients { shared, courier, active: HashMap::new() };
        StepLoop { scheduler, runner, commands, clients, unsent: Vec::new() }
    }

    /// Runs until every handle is gone, or until a step fails.
    pub fn run(mut self) {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.step_until_closed()));
        let reason: Arc<str> = match outcome {
            Ok(Ok(())) => return,
            Ok(Err(failure)) => failure.to_string().into(),
            Err(panic) => panic_message(panic.as_ref()).into(),
        };
        error!(%reason, "the engine has stopped");
        self.fail(&reason);
    }

    fn step_until_closed(&mut self) -> Result<(), RunnerError> {
        while self.receive() {
            if self.scheduler.has_work() {
                self.step()?;
            }
        }
        Ok(())
    }

    /// Handles waiting commands; sleeps while there is no work. False once all handles are gone
    /// and nothing runs.
    fn receive(&mut self) -> bool {
        if !self.scheduler.has_work() {
            let Ok(command) = self.commands.recv() else { return false };
            self.handle(command);
        }
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.handle(command),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return self.scheduler.has_work(),
            }
        }
    }

    fn step(&mut self) -> Result<(), RunnerError> {
        let batch = self.scheduler.plan();
        let started = Instant::now();
        self.note_plan(started);
        let StepLoop { scheduler, runner, clients, unsent, .. } = self;
        if runner.has_device() {
            clients.shared.watch.begin();
        }
        let results = runner.execute_beside(&batch, &mut || {
            clients.emit(std::mem::take(unsent));
            scheduler.plan_ahead(&batch);
        })?;
        clients.shared.watch.end();
        let events = self.scheduler.commit(&batch, results);
        let report = self.scheduler.step_report();
        self.clients.shared.metrics.record_step(&report);
        debug!(
            step = batch.step,
            num_tokens = report.num_tokens,
            num_running = report.num_running,
            elapsed_us = started.elapsed().as_micros() as u64,
            "step"
        );
        self.unsent = events;
        if !self.runner.has_device() || !self.scheduler.has_work() {
            self.send_unsent();
        }
        Ok(())
    }

    fn send_unsent(&mut self) {
        self.clients.emit(std::mem::take(&mut self.unsent));
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => self.admit(*submission),
            Command::Abort { id, index } => {
                self.send_unsent();
                let events = self.scheduler.abort(&id, index);
                self.clients.emit(events);
                self.report_idle();
            }
            Command::AbortAll => {
                self.send_unsent();
                let ids: Vec<RequestId> = self.clients.active.keys().cloned().collect();
                for id in ids {
                    let events = self.scheduler.abort(&id, None);
                    self.clients.emit(events);
                }
                self.report_idle();
            }
            Command::ResetPrefixCache => self.scheduler.reset_prefix_cache(),
        }
    }

    fn admit(&mut self, submission: Submission) {
        let Submission { request, events, arrived } = submission;
        let id = request.id.clone();
        let report = RequestReport {
            finished_reason: "abort",
            num_prompt_tokens: request.prompt_token_ids.len(),
            num_cached_tokens: 0,
            num_generated_tokens: 0,
            n: request.n,
            max_tokens: request.stop.max_tokens,
            e2e: Duration::ZERO,
            queued: None,
            prefill: None,
            decode: None,
            num_preemptions: 0,
        };
        let n = request.n;
        if let Err(refusal) = self.scheduler.admit(request) {
            refuse(&id, n, &events, &refusal.to_string().into());
            self.clients.shared.release(true);
            return;
        }
        let timeline = Timeline { arrived, started: None, first_token: None, last_token: None };
        self.clients.active.insert(id, Active { events, num_open: n, timeline, report });
    }

    /// Requests that run for the first time leave the queue.
    fn note_plan(&mut self, now: Instant) {
        for id in self.scheduler.newly_started() {
            if let Some(active) = self.clients.active.get_mut(id) {
                active.timeline.started = Some(now);
                self.clients.shared.dequeue();
            }
        }
        for id in self.scheduler.newly_preempted() {
            if let Some(active) = self.clients.active.get_mut(id) {
                active.report.num_preemptions += 1;
            }
        }
    }

    /// Aborts change the gauges outside any step.
    fn report_idle(&mut self) {
        if !self.scheduler.has_work() {
            self.clients.shared.metrics.record_step(&StepReport {
                num_running: 0,
                num_waiting: 0,
                kv_cache_usage: self.scheduler.step_report().kv_cache_usage,
                ..StepReport::default()
            });
        }
    }

    fn fail(&mut self, reason: &Arc<str>) {
        self.send_unsent();
        self.clients.fail(reason);
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Submit(submission) = command {
                let Submission { request, events, .. } = *submission;
                refuse(&request.id, request.n, &events, reason);
                self.clients.shared.release(true);
            }
        }
    }
}

impl Clients {
    fn emit(&mut self, events: Vec<TokenEvent>) {
        let now = Instant::now();
        let mut handover = Handover::with_capacity(events.len());
        let mut ended = Vec::new();
        for event in events {
            let Some(active) = self.active.get_mut(&event.request_id) else { continue };
            active.note(&event, now, &self.shared);
            if event.finish.is_some() && active.num_open == 0 {
                ended.push(event.request_id.clone());
            }
            handover.push((active.events.clone(), event));
        }
        // Nobody is waited for: books are closed while clients are being told.
        self.courier.send(handover);
        for id in ended {
            self.close(&id, now);
        }
    }

    fn close(&mut self, id: &RequestId, now: Instant) {
        let Some(Active { timeline, mut report, .. }) = self.active.remove(id) else { return };
        timeline.fill(&mut report, now);
        self.shared.metrics.record_request(&report);
        debug!(request_id = %id, reason = report.finished_reason,
            prompt_tokens = report.num_prompt_tokens, generated = report.num_generated_tokens,
            cached = report.num_cached_tokens, "request ended");
        self.shared.release(timeline.started.is_none());
    }

    /// Ends every request.
    fn fail(&mut self, reason: &Arc<str>) {
        self.shared.set_status(EngineStatus::Dead(Arc::clone(reason)));
        let ids: Vec<(RequestId, u32)> =
            self.active.iter().map(|(id, active)| (id.clone(), active.report.n)).collect();
        let ends = ids.iter().flat_map(|(id, n)| {
            (0..*n).map(|index| end(id, index, FinishReason::Error(Arc::clone(reason))))
        });
        self.emit(ends.collect());
        self.shared.metrics.record_step(&StepReport::default());
    }
}

/// Ends every continuation of a request that never ran.
fn refuse(id: &RequestId, n: u32, events: &mpsc::Sender<TokenEvent>, reason: &Arc<str>) {
    for index in 0..n {
        // A failed send means that the client is gone.
        let _ = events.try_send(end(id, index, FinishReason::Error(Arc::clone(reason))));
    }
}

impl Active {
    /// Keeps the books of one event: counts, moments, latencies.
    fn note(&mut self, event: &TokenEvent, now: Instant, shared: &Shared) {
        if let Some(prompt) = &event.prompt {
            self.report.num_cached_tokens = prompt.num_cached_tokens as usize;
        }
        if !event.tokens.is_empty() {
            self.report.num_generated_tokens += event.tokens.len();
            match self.timeline.last_token.replace(now) {
                None => {
                    self.timeline.first_token = Some(now);
                    shared.metrics.record_first_token(now - self.timeline.arrived);
                }
                Some(last) if self.report.n == 1 => {
                    shared.metrics.record_inter_token(now - last);
                }
                Some(_) => {} // continuations interleave; their gaps say nothing
            }
        }
        if let Some(finish) = &event.finish {
            self.report.finished_reason = finish.as_str();
            self.num_open = self.num_open.saturating_sub(1);
        }
    }
}

impl Timeline {
    fn fill(&self, report: &mut RequestReport, now: Instant) {
        report.e2e = now - self.arrived;
        report.queued = self.started.map(|started| started - self.arrived);
        report.prefill = self.started.zip(self.first_token).map(|(start, first)| first - start);
        report.decode = self.first_token.map(|first| now - first);
    }
}

fn end(id: &RequestId, index: u32, finish: FinishReason) -> TokenEvent {
    TokenEvent {
        request_id: id.clone(),
        index,
        tokens: Vec::new(),
        finish: Some(finish),
        prompt: None,
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().map(str::to_owned);
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("a step panicked: {}", text.unwrap_or_else(|| "no message".to_owned()))
}
