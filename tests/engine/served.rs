//! The engine with a scripted runner: streams, stop strings, disconnects, limits, drain, death.

use std::sync::mpsc;
use std::time::Duration;

use tokenmill::engine::{Engine, EngineError, EngineStatus, Generation};
use tokenmill::output::{FinishReason, TextDelta};
use tokenmill::request::{GenerateRequest, Prompt, RequestId};
use tokenmill::runner::{RunnerError, ScriptedRunner, StepRunner};
use tokenmill::scheduler::batch::{ScheduledBatch, StepTokens};
use tokio::runtime::Handle;

use crate::support;

/// Long enough for any scheduler hiccup; no test waits for it when all is well.
const PATIENCE: Duration = Duration::from_secs(20);

fn request(id: &str, prompt: &str, max_tokens: u32) -> GenerateRequest {
    let prompt = Prompt::Text { text: prompt.to_owned(), add_special_tokens: false };
    let mut request = GenerateRequest::new(RequestId(id.into()), prompt);
    request.stop.max_tokens = Some(max_tokens);
    request
}

fn start(runner: impl StepRunner + 'static) -> Engine {
    let options = support::engine_options(support::scheduler_params());
    Engine::start(Box::new(runner), support::text_pipeline(), options, &Handle::current())
}

/// Repeats `text`, whose bytes must differ from each other.
fn spelling(text: &str) -> ScriptedRunner {
    ScriptedRunner::cycling(text.bytes().map(u32::from).collect())
}

async fn collect(mut generation: Generation) -> Vec<TextDelta> {
    let mut deltas = Vec::new();
    while let Some(delta) = generation.next().await {
        deltas.push(delta);
    }
    deltas
}

fn text_of(deltas: &[TextDelta]) -> String {
    deltas.iter().map(|d| d.text.as_str()).collect()
}

async fn wait_until_idle(engine: &Engine) {
    let idle = async {
        while engine.num_active() > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, idle).await.expect("the engine becomes idle");
}

/// Holds every step until the test lets it go.
struct Gated {
    inner: ScriptedRunner,
    gate: mpsc::Receiver<()>,
}

impl Gated {
    fn new(inner: ScriptedRunner) -> (Gated, mpsc::Sender<()>) {
        let (open, gate) = mpsc::channel();
        (Gated { inner, gate }, open)
    }
}

impl StepRunner for Gated {
    fn execute(&mut self, batch: &ScheduledBatch) -> Result<Vec<StepTokens>, RunnerError> {
        // A dropped gate stays open.
        let _ = self.gate.recv();
        self.inner.execute(batch)
    }
}

/// A device: the host goes on while a step is computed, which ends when the test lets it.
struct Beside(Gated);

impl StepRunner for Beside {
    fn execute(&mut self, batch: &ScheduledBatch) -> Result<Vec<StepTokens>, RunnerError> {
        self.0.execute(batch)
    }

    fn has_device(&self) -> bool {
        true
    }

    fn execute_beside(
        &mut self,
        batch: &ScheduledBatch,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<Vec<StepTokens>, RunnerError> {
        meanwhile();
        self.execute(batch)
    }
}

/// Fails at a given step, by an error or by a panic.
struct Failing {
    inner: ScriptedRunner,
    at_step: u64,
    panics: bool,
}

impl StepRunner for Failing {
    fn execute(&mut self, batch: &ScheduledBatch) -> Result<Vec<StepTokens>, RunnerError> {
        if batch.step < self.at_step {
            return self.inner.execute(batch);
        }
        assert!(!self.panics, "the device caught fire");
        Err(RunnerError::StepFailed { step: batch.step, reason: "out of coffee".to_owned() })
    }
}

#[tokio::test]
async fn text_arrives_whole_and_ends_at_max_tokens() {
    let engine = start(spelling("cabin "));
    let deltas = collect(engine.submit(request("a", "x", 8)).await.expect("accepted")).await;
    assert_eq!(text_of(&deltas), "cabin ca");
    let last = deltas.last().expect("some delta");
    assert_eq!(last.finish, Some(FinishReason::Length));
    assert_eq!(deltas.iter().map(|d| d.token_ids.len()).sum::<usize>(), 8);
    assert!(deltas[0].prompt.is_some());
    wait_until_idle(&engine).await;
}

#[tokio::test]
async fn a_token_is_sent_while_a_device_computes_the_next() {
    let (runner, gate) = Gated::new(spelling("abc"));
    let engine = start(Beside(runner));
    let mut generation = engine.submit(request("a", "x", 3)).await.expect("accepted");
    gate.send(()).expect("the engine waits for the first step");
    let first = tokio::time::timeout(PATIENCE, generation.next()).await;
    let first = first.expect("the second step ends later").expect("a token");
    assert_eq!(first.token_ids.len(), 1);
    drop(gate);
    let rest = tokio::time::timeout(PATIENCE, collect(generation)).await;
    let rest = rest.expect("the last token waits for no further step");
    assert_eq!(first.text + &text_of(&rest), "abc");
    wait_until_idle(&engine).await;
}

#[tokio::test]
async fn characters_are_never_split() {
    let engine = start(spelling("né€😀."));
    let deltas = collect(engine.submit(request("a", "x", 11)).await.expect("accepted")).await;
    assert_eq!(text_of(&deltas), "né€😀.");
    assert!(deltas.iter().all(|d| !d.text.contains('\u{fffd}')));
}

#[tokio::test]
async fn a_stop_string_ends_the_output_and_frees_the_sequence() {
    let engine = start(spelling("one tw3"));
    let mut request = request("a", "x", 200);
    request.stop.stop = vec!["tw".to_owned()];
    let deltas = collect(engine.submit(request).await.expect("accepted")).await;
    assert_eq!(text_of(&deltas), "one ");
    let stop = FinishReason::StopString("tw".to_owned());
    assert_eq!(deltas.last().and_then(|d| d.finish.clone()), Some(stop));
    wait_until_idle(&engine).await;
}

#[tokio::test]
async fn a_stop_string_counts_only_after_min_tokens() {
    let engine = start(spelling("abc"));
    let mut request = request("a", "q", 60);
    request.stop.stop = vec!["bc".to_owned()];
    request.stop.min_tokens = 4;
    let deltas = collect(engine.submit(request).await.expect("accepted")).await;
    assert_eq!(text_of(&deltas), "abca");
    wait_until_idle(&engine).await;
}

#[tokio::test]
async fn the_end_token_is_counted_but_not_shown() {
    let script = vec![u32::from(b'o'), u32::from(b'k'), support::EOS];
    let engine = start(ScriptedRunner::cycling(script));
    let deltas = collect(engine.submit(request("a", "x", 50)).await.expect("accepted")).await;
    assert_eq!(text_of(&deltas), "ok");
    assert_eq!(deltas.last().and_then(|d| d.finish.clone()), Some(FinishReason::EndOfText));
    assert_eq!(deltas.iter().map(|d| d.token_ids.len()).sum::<usize>(), 3);
}

#[tokio::test]
async fn dropping_a_generation_ends_its_request() {
    let (runner, gate) = Gated::new(spelling("x"));
    let engine = start(runner);
    let mut generation = engine.submit(request("a", "x", 400)).await.expect("accepted");
    gate.send(()).expect("the engine runs");
    assert!(generation.next().await.is_some());
    drop(generation);
    drop(gate);
    wait_until_idle(&engine).await;
    assert!(engine.metrics().render().contains("finished_reason=\"abort\""));
}

#[tokio::test]
async fn a_full_queue_refuses_and_recovers() {
    let (runner, gate) = Gated::new(spelling("x"));
    let mut options = support::engine_options(support::scheduler_params());
    options.max_num_queued_requests = 2;
    let engine =
        Engine::start(Box::new(runner), support::text_pipeline(), options, &Handle::current());
    // The first request is taken into a step that waits at the gate; two more fill the queue.
    let first = engine.submit(request("first", "x", 1)).await.expect("accepted");
    let leaves_queue = async {
        loop {
            match engine.submit(request("probe", "x", 1)).await {
                Err(EngineError::QueueFull { limit: 2 }) => break,
                Ok(generation) => std::mem::forget(generation),
                Err(other) => panic!("unexpected refusal: {other}"),
            }
        }
    };
    tokio::time::timeout(PATIENCE, leaves_queue).await.expect("the queue fills up");
    drop(gate);
    assert_eq!(text_of(&collect(first).await), "x");
}

#[tokio::test]
async fn prompts_that_cannot_fit_are_refused_with_both_numbers() {
    let engine = start(spelling("x"));
    let long = "y".repeat(512);
    let refusal = engine.submit(request("a", &long, 1)).await.err().expect("refused");
    assert!(matches!(
        refusal,
        EngineError::PromptTooLong { prompt_tokens: 512, max_model_len: 512 }
    ));
    let refusal = engine.submit(request("b", "four", 509)).await.err().expect("refused");
    assert!(refusal.to_string().contains("at most 508"), "{refusal}");
    assert!(matches!(
        engine.submit(request("c", "", 1)).await.err(),
        Some(EngineError::EmptyPrompt)
    ));
    assert_eq!(engine.num_active(), 0);
}

#[tokio::test]
async fn a_repeated_request_id_disturbs_nobody() {
    let (runner, gate) = Gated::new(spelling("ab"));
    let engine = start(runner);
    let first = engine.submit(request("same", "x", 4)).await.expect("accepted");
    let second = engine.submit(request("same", "x", 4)).await.expect("accepted");
    drop(gate);
    assert_eq!(text_of(&collect(first).await), "abab");
    let deltas = collect(second).await;
    assert!(matches!(deltas[0].finish, Some(FinishReason::Error(_))), "{deltas:?}");
    wait_until_idle(&engine).await;
}

#[tokio::test]
async fn draining_lets_running_requests_finish() {
    let (runner, gate) = Gated::new(spelling("abc"));
    let engine = start(runner);
    let generation = engine.submit(request("a", "x", 6)).await.expect("accepted");
    let draining = tokio::spawn({
        let engine = engine.clone();
        async move { engine.drain(PATIENCE).await }
    });
    while engine.status() == EngineStatus::Ready {
        tokio::task::yield_now().await;
    }
    assert!(matches!(engine.submit(request("b", "x", 1)).await, Err(EngineError::Draining)));
    drop(gate);
    assert_eq!(text_of(&collect(generation).await), "abcabc");
    assert_eq!(draining.await.expect("drain ends"), 0);
}

#[tokio::test]
async fn draining_aborts_what_outlives_its_timeout() {
    let (runner, gate) = Gated::new(spelling("abc"));
    let engine = start(runner);
    let generation = engine.submit(request("a", "x", 400)).await.expect("accepted");
    let drained = engine.clone();
    let draining = tokio::spawn(async move { drained.drain(Duration::from_millis(1)).await });
    while !draining.is_finished() && engine.num_active() > 0 {
        // Steps keep coming, slowly; the abort is handled between two of them.
        let _ = gate.send(());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(draining.await.expect("drain ends"), 1);
    let deltas = collect(generation).await;
    assert_eq!(deltas.last().and_then(|d| d.finish.clone()), Some(FinishReason::Abort));
}

#[tokio::test]
async fn a_failed_step_ends_its_requests_with_the_reason() {
    for panics in [false, true] {
        let engine = start(Failing { inner: spelling("ab"), at_step: 2, panics });
        let deltas = collect(engine.submit(request("a", "x", 50)).await.expect("accepted")).await;
        assert_eq!(text_of(&deltas), "ab");
        let Some(FinishReason::Error(reason)) = deltas.last().and_then(|d| d.finish.clone()) else {
            panic!("the stream ends with an error")
        };
        let word = if panics { "caught fire" } else { "out of coffee" };
        assert!(reason.contains(word), "{reason}");
        assert!(matches!(engine.status(), EngineStatus::Dead(_)));
        assert!(matches!(engine.submit(request("b", "x", 1)).await, Err(EngineError::Dead(_))));
        wait_until_idle(&engine).await;
    }
}

#[tokio::test]
async fn continuations_stop_one_by_one() {
    // Continuation texts differ in nothing, so all of them stop at the same string.
    let engine = start(spelling("abc_ghi xyz"));
    let mut request = request("a", "q", 60);
    request.n = 3;
    request.stop.stop = vec!["xy".to_owned()];
    let deltas = collect(engine.submit(request).await.expect("accepted")).await;
    for index in 0..3 {
        let own: Vec<TextDelta> = deltas.iter().filter(|d| d.index == index).cloned().collect();
        assert_eq!(text_of(&own), "abc_ghi ");
        assert_eq!(own.iter().filter(|d| d.finish.is_some()).count(), 1);
    }
    wait_until_idle(&engine).await;
}
