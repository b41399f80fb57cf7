//! `tokenmill bench serve`: the load generator, against any server that speaks the OpenAI API.
//!
//! Sends `/v1/completions` with token ids, streamed and greedy, and counts tokens by the
//! server's own `usage`, so that every engine is asked for the same work and measured alike.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::client::{BaseUrl, ClientError, EventStream};
use super::figures::LoadFigures;
use super::load::{Pace, RequestTrace, drive};
use super::parse_count;
use super::record::{Kind, Measured, RecordArgs, Recorder};
use super::throughput::{options, refuse_failures};
use super::workload::WorkloadArgs;
use crate::ops::cpu::physical_cores;

/// Flags of `bench serve`.
#[derive(Clone, Debug, Args)]
pub struct ServeBenchArgs {
    /// Where the server is; http:// only
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000")]
    base_url: BaseUrl,
    /// Name under which the server knows its model
    #[arg(long, value_name = "NAME", default_value = "tiny")]
    pub model: String,
    /// Key for a server that wants one
    #[arg(long, value_name = "KEY", env = "TOKENMILL_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Random ids lie below this; at most the size of the model's vocabulary
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = parse_count)]
    pub vocab_size: usize,
    /// Send text instead of token ids, about one token per word, to servers that take no ids
    #[arg(long)]
    pub text_prompts: bool,
    /// JSON object with more fields for every request body
    #[arg(long, value_name = "JSON", value_parser = parse_object)]
    pub extra_body: Option<Map<String, Value>>,
    /// Give up on an answer after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    pub timeout: u64,
    /// Seed of the prompts
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Load flags.
    #[command(flatten)]
    pub workload: WorkloadArgs,
    /// Record flags.
    #[command(flatten)]
    pub record: RecordArgs,
}

/// Measures.
pub fn run(args: &ServeBenchArgs) -> anyhow::Result<()> {
    // Limits of this machine say nothing about a server on another one.
    let measured = match args.base_url.is_loopback() {
        true if args.record.names_gpu() => Measured::Gpu,
        true => Measured::Host { threads: physical_cores() },
        false => Measured::Elsewhere,
    };
    let mut recorder = Recorder::begin(args.record.clone(), measured)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the runtime cannot start")?;
    let (workload, seed) = (&args.workload, args.seed);
    let target = Arc::new(Target::new(args));
    let send = |prompt: Vec<u32>| {
        let target = Arc::clone(&target);
        async move { target.generate(&prompt).await }
    };
    let outcome = runtime.block_on(async {
        let warmup = workload.warmup_prompts(args.vocab_size, seed);
        let warmed = drive(warmup, Pace::default(), send).await;
        warmed.all().context("warming up")?;
        let prompts = workload.prompts(args.vocab_size, seed);
        anyhow::Ok(drive(prompts, Pace::of(workload, seed), send).await)
    })?;
    recorder.end();
    let figures = LoadFigures::of(&outcome);
    figures.print();
    let asked = figures.completed * workload.output_len;
    if figures.total_output_tokens != asked {
        println!(
            "asked for {asked} output tokens, got {}: the server may not know ignore_eos",
            figures.total_output_tokens
        );
    }
    let mut options = options(workload, seed);
    options["text_prompts"] = json!(args.text_prompts);
    options["extra_body"] = json!(args.extra_body);
    options["base_url"] = json!(format!("http://{}{}", target.url.authority, target.url.path));
    recorder.write(Kind::Serve, json!({"name": args.model}), options, &figures)?;
    refuse_failures(outcome)
}

/// A server and what every request to it has in common.
struct Target {
    url: BaseUrl,
    api_key: Option<String>,
    timeout: Duration,
    text_prompts: bool,
    /// Everything but the prompt.
    body: Value,
}

impl Target {
    fn new(args: &ServeBenchArgs) -> Target {
        let mut body = json!({
            "model": args.model,
            "max_tokens": args.workload.output_len,
            "temperature": 0,
            "ignore_eos": true,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        for (key, value) in args.extra_body.iter().flatten() {
            body[key] = value.clone();
        }
        Target {
            url: args.base_url.clone(),
            api_key: args.api_key.clone(),
            timeout: Duration::from_secs(args.timeout),
            text_prompts: args.text_prompts,
            body,
        }
    }

    /// Sends one prompt and reads the answer to its end.
    async fn generate(&self, prompt: &[u32]) -> anyhow::Result<RequestTrace> {
        match tokio::time::timeout(self.timeout, self.read_answer(prompt)).await {
            Ok(trace) => trace,
            Err(_) => Err(ClientError::TimedOut(self.timeout).into()),
        }
    }

    async fn read_answer(&self, prompt: &[u32]) -> anyhow::Result<RequestTrace> {
        let mut body = self.body.clone();
        body["prompt"] = if self.text_prompts { json!(words(prompt)) } else { json!(prompt) };
        let mut answer = Answer::new(Instant::now());
        let key = self.api_key.as_deref();
        let mut stream = EventStream::post(&self.url, "/v1/completions", key, &body).await?;
        while !answer.done {
            let events = stream.next().await?;
            let now = Instant::now();
            anyhow::ensure!(!events.is_empty(), ClientError::Closed);
            for event in events {
                answer.event(&event, now)?;
            }
        }
        answer.finish()
    }
}

/// A text of one letter per id, about one token each.
fn words(ids: &[u32]) -> String {
    let letters: Vec<String> =
        ids.iter().map(|id| char::from(b'a' + (id % 26) as u8).to_string()).collect();
    letters.join(" ")
}

/// The part of an event that is looked at; the rest is skipped, because reading it would take time
/// from the server that is measured.
#[derive(Deserialize)]
struct Event<'a> {
    #[serde(borrow)]
    choices: Option<Vec<EventChoice<'a>>>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct EventChoice<'a> {
    #[serde(borrow)]
    text: Option<Cow<'a, str>>,
    token_ids: Option<Vec<u32>>,
    #[serde(borrow)]
    finish_reason: Option<Cow<'a, str>>,
}

#[derive(Clone, Copy, Default, Deserialize)]
struct Usage {
    prompt_tokens: Option<usize>,
    completion_tokens: Option<usize>,
    prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Clone, Copy, Default, Deserialize)]
struct PromptDetails {
    cached_tokens: Option<usize>,
}

/// What the events of one answer have told so far.
struct Answer {
    trace: RequestTrace,
    usage: Option<Usage>,
    done: bool,
}

impl Answer {
    fn new(sent: Instant) -> Answer {
        let trace = RequestTrace {
            sent,
            arrivals: Vec::new(),
            ended: sent,
            num_input_tokens: 0,
            num_cached_tokens: 0,
            num_output_tokens: 0,
        };
        Answer { trace, usage: None, done: false }
    }

    fn event(&mut self, data: &str, now: Instant) -> anyhow::Result<()> {
        self.trace.ended = now;
        if data == "[DONE]" {
            self.done = true;
            return Ok(());
        }
        let event: Event<'_> =
            serde_json::from_str(data).with_context(|| format!("an event is no JSON: {data}"))?;
        if let Some(error) = event.error {
            anyhow::bail!("the server failed: {error}");
        }
        if let Some([choice, ..]) = event.choices.as_deref() {
            let has_text = choice.text.as_ref().is_some_and(|text| !text.is_empty());
            let has_ids = choice.token_ids.as_ref().is_some_and(|ids| !ids.is_empty());
            // A single token may be part of a character, which is shown with the end or never.
            let ends_silent = choice.finish_reason.is_some() && self.trace.arrivals.is_empty();
            if has_text || has_ids || ends_silent {
                self.trace.arrivals.push(now);
            }
        }
        self.usage = event.usage.or(self.usage);
        Ok(())
    }

    fn finish(mut self) -> anyhow::Result<RequestTrace> {
        let usage = self.usage.unwrap_or_default();
        let needed = |key: &str, count: Option<usize>| {
            count.with_context(|| {
                format!(
                    "the server sent no usage.{key} at the end of its stream, so tokens cannot \
                     be counted; it must honour stream_options.include_usage"
                )
            })
        };
        self.trace.num_input_tokens = needed("prompt_tokens", usage.prompt_tokens)?;
        self.trace.num_output_tokens = needed("completion_tokens", usage.completion_tokens)?;
        let details = usage.prompt_tokens_details.unwrap_or_default();
        self.trace.num_cached_tokens = details.cached_tokens.unwrap_or(0);
        Ok(self.trace)
    }
}

fn parse_object(text: &str) -> Result<Map<String, Value>, String> {
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        _ => Err("a JSON object is needed, for example '{\"return_token_ids\": true}'".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The trace of an answer whose event `i` comes at `i` milliseconds.
    fn trace(events: &[&str]) -> anyhow::Result<RequestTrace> {
        let base = Instant::now();
        let mut answer = Answer::new(base);
        for (i, event) in (0..).zip(events) {
            answer.event(event, base + Duration::from_millis(i))?;
        }
        assert!(answer.done, "the events end with [DONE]");
        answer.finish()
    }

    #[test]
    fn pieces_are_counted_by_arrival_and_tokens_by_usage() {
        let trace = trace(&[
            r#"{"choices": [{"text": "a", "finish_reason": null}], "usage": null}"#,
            r#"{"choices": [{"text": ""}]}"#,
            r#"{"choices": [{"text": "bc"}]}"#,
            r#"{"choices": [{"text": "", "finish_reason": "length"}]}"#,
            r#"{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4,
                "prompt_tokens_details": {"cached_tokens": 5}}}"#,
            "[DONE]",
        ])
        .unwrap();
        let at: Vec<_> =
            trace.arrivals.iter().map(|at| at.duration_since(trace.sent).as_millis()).collect();
        assert_eq!(at, [0, 2]);
        assert_eq!((trace.num_input_tokens, trace.num_output_tokens), (9, 4));
        assert_eq!(trace.num_cached_tokens, 5);
        assert_eq!(trace.ended.duration_since(trace.sent).as_millis(), 5);
    }

    #[test]
    fn a_token_without_text_arrives_with_the_end() {
        let usage = r#"{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}"#;
        let silent = r#"{"choices": [{"text": "", "finish_reason": "length"}]}"#;
        assert_eq!(trace(&[silent, usage, "[DONE]"]).unwrap().arrivals.len(), 1);
    }

    #[test]
    fn an_answer_without_usage_or_with_an_error_is_a_failure() {
        let error = trace(&[r#"{"choices": [{"text": "a"}]}"#, "[DONE]"]).unwrap_err();
        assert!(error.to_string().contains("usage.prompt_tokens"), "{error}");
        let error = trace(&[r#"{"error": {"message": "out of memory"}}"#]).unwrap_err();
        assert!(error.to_string().contains("out of memory"), "{error}");
    }

    #[test]
    fn text_prompts_have_a_word_per_id() {
        assert_eq!(words(&[0, 27, 25]), "a b z");
    }

    #[test]
    fn extra_fields_come_as_an_object() {
        assert_eq!(parse_object(r#"{"a": 1}"#).unwrap()["a"], json!(1));
        assert!(parse_object("[1]").is_err());
    }
}
