//! `tokenmill chat`: a conversation in the terminal, streamed, with no server in between.

use std::io::Write;

use anyhow::Context;
use clap::Args;
use rustyline::error::ReadlineError;
use serde_json::{Value, json};

use super::open;
use crate::config::{CacheArgs, EngineConfig, ModelArgs, SchedulerArgs, ServeArgs};
use crate::engine::Engine;
use crate::output::FinishReason;
use crate::request::{ChatPrompt, GenerateRequest, Prompt, RequestId, SamplingParams};

/// Flags of `chat`.
#[derive(Clone, Debug, Args)]
pub struct ChatArgs {
    /// Model flags.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Cache and device flags.
    #[command(flatten)]
    pub cache: CacheArgs,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// 0 always takes the most likely token; default: the model's own
    #[arg(long)]
    pub temperature: Option<f32>,
    /// Longest answer in tokens
    #[arg(long, default_value_t = 1024)]
    pub max_tokens: u32,
}

const HELP: &str = "\
  /clear    start over          /system TEXT  set the system prompt and start over
  /help     this list           /exit         leave (or Ctrl-D); Ctrl-C stops an answer";

/// The conversation so far and how to continue it.
struct Conversation {
    engine: Engine,
    messages: Vec<Value>,
    system: Option<String>,
    sampling: SamplingParams,
    max_tokens: u32,
    turn: u64,
}

/// Chats until the input ends.
pub fn run(args: ChatArgs) -> anyhow::Result<()> {
    // No logs: they would write into the conversation.
    let (system, max_tokens, temperature) = (args.system, args.max_tokens, args.temperature);
    let config = EngineConfig::resolve(serve_args(args.model, args.cache))?;
    let name = config.server.served_model_names[0].clone();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("the runtime cannot start its threads")?;
    let opened = open::open(&config, runtime.handle())?;
    println!(
        "{name}, loaded in {:.2} s on {}; /help lists commands",
        opened.load_time.as_secs_f64(),
        opened.backend
    );
    let sampling = sampling(&opened.engine, temperature);
    let engine = opened.engine;
    let mut conversation =
        Conversation { engine, messages: Vec::new(), system, sampling, max_tokens, turn: 0 };
    conversation.clear();
    let mut editor = rustyline::DefaultEditor::new().context("the terminal cannot be read")?;
    loop {
        match editor.readline("\n> ") {
            Ok(line) => {
                // History is a comfort; a full one is no reason to stop.
                let _ = editor.add_history_entry(&line);
                if !conversation.handle(line.trim(), &runtime)? {
                    return Ok(());
                }
            }
            Err(ReadlineError::Interrupted) => println!("(/exit leaves)"),
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(error).context("the terminal cannot be read"),
        }
    }
}

/// Chat needs no server; its flags take their defaults.
fn serve_args(model: ModelArgs, cache: CacheArgs) -> ServeArgs {
    let scheduler = SchedulerArgs { max_num_seqs: 1, ..super::default_args() };
    ServeArgs { model, cache, scheduler, server: super::default_args() }
}

fn sampling(engine: &Engine, temperature: Option<f32>) -> SamplingParams {
    let model = &engine.model().defaults;
    let defaults = SamplingParams::default();
    SamplingParams {
        temperature: temperature.or(model.temperature).unwrap_or(defaults.temperature).max(0.0),
        top_p: model.top_p.unwrap_or(defaults.top_p),
        top_k: model.top_k.unwrap_or(defaults.top_k),
        min_p: model.min_p.unwrap_or(defaults.min_p),
        repetition_penalty: model.repetition_penalty.unwrap_or(defaults.repetition_penalty),
        ..defaults
    }
}

impl Conversation {
    /// Obeys a command or answers a message; false when the conversation is over.
    fn handle(&mut self, line: &str, runtime: &tokio::runtime::Runtime) -> anyhow::Result<bool> {
        match line.split_once(' ').unwrap_or((line, "")) {
            ("", _) => {}
            ("/exit" | "/quit", _) => return Ok(false),
            ("/help", _) => println!("{HELP}"),
            ("/clear", _) => self.clear(),
            ("/system", text) => {
                self.system = Some(text.trim().to_owned()).filter(|text| !text.is_empty());
                self.clear();
            }
            (command, _) if command.starts_with('/') => {
                println!("{command} is not a command\n{HELP}");
            }
            _ => {
                self.messages.push(json!({"role": "user", "content": line}));
                runtime.block_on(self.answer())?;
            }
        }
        Ok(true)
    }

    fn clear(&mut self) {
        self.messages.clear();
        if let Some(system) = &self.system {
            self.messages.push(json!({"role": "system", "content": system}));
        }
    }

    /// Streams one answer to the terminal; Ctrl-C ends it early and keeps what came.
    async fn answer(&mut self) -> anyhow::Result<()> {
        let request = self.request();
        let mut generation = match self.engine.submit(request).await {
            Ok(generation) => generation,
            Err(error) => {
                self.messages.pop();
                println!("{error}");
                return Ok(());
            }
        };
        let mut answer = String::new();
        let mut finish = None;
        let mut out = std::io::stdout();
        loop {
            let delta = tokio::select! {
                delta = generation.next() => delta,
                _ = tokio::signal::ctrl_c() => break,
            };
            let Some(delta) = delta else { break };
            out.write_all(delta.text.as_bytes())?;
            out.flush()?;
            answer.push_str(&delta.text);
            finish = delta.finish.or(finish);
        }
        match finish {
            Some(FinishReason::Length) => println!(" … (cut at {} tokens)", self.max_tokens),
            Some(FinishReason::Error(reason)) => anyhow::bail!("the engine failed: {reason}"),
            Some(_) => println!(),
            None => println!(" … (stopped)"),
        }
        self.messages.push(json!({"role": "assistant", "content": answer}));
        Ok(())
    }

    fn request(&mut self) -> GenerateRequest {
        let prompt = Prompt::Chat(ChatPrompt {
            messages: self.messages.clone(),
            tools: None,
            documents: None,
            add_generation_prompt: true,
            continue_final_message: false,
            add_special_tokens: false,
            template_kwargs: serde_json::Map::new(),
        });
        self.turn += 1;
        let mut request = GenerateRequest::new(RequestId::random("chat"), prompt);
        request.sampling = SamplingParams { seed: self.turn, ..self.sampling.clone() };
        // An answer may fill what is left of the context, but no more than was asked for.
        let limit = u32::try_from(self.engine.model().max_model_len / 2).unwrap_or(u32::MAX);
        request.stop.max_tokens = Some(self.max_tokens.min(limit));
        request
    }
}
