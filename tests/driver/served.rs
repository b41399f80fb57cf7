//! What is served on the driver is what is served on the CPU.

use serde_json::Value;

use crate::stub::{Setup, greedy};

/// More than fit into a step, of different lengths, so that batches grow and shrink.
pub fn questions() -> Vec<Value> {
    [
        ("Hello", 8),
        ("What is the capital of France?", 6),
        ("Who are you?", 12),
        ("What is 2 + 2?", 5),
        ("Name a colour.", 3),
    ]
    .map(|(question, max_tokens)| greedy(question, max_tokens))
    .into()
}

/// The CPU's answers: on plain instructions, which every machine has.
fn on_the_cpu(flags: &str) -> Vec<String> {
    let server = Setup::new(&format!("--device cpu --cpu-isa scalar {flags}")).start();
    server.texts(&questions())
}

/// Lines that begin so.
pub fn count(trace: &[String], what: &str) -> usize {
    trace.iter().filter(|line| line.starts_with(what)).count()
}

#[test]
fn greedy_tokens_of_recorded_and_launched_steps_are_the_cpus() {
    let expected = on_the_cpu("");
    let recorded = Setup::new("--device cuda").start();
    assert_eq!(recorded.texts(&questions()), expected);
    let trace = recorded.trace();
    let [graphs, replayed] = ["graph ", "replay "].map(|what| count(&trace, what));
    assert_eq!(graphs, 3, "steps of one, two and four sequences, before anything was asked");
    assert!(replayed >= 8, "{replayed} steps were replayed");
    let eager = Setup::new("--device cuda --enforce-eager").start();
    assert_eq!(eager.texts(&questions()), expected);
    assert_eq!(count(&eager.trace(), "graph "), 0, "nothing was recorded");
}

#[test]
fn greedy_tokens_of_int8_weights_are_the_cpus() {
    let flags = "--quantization int8";
    let server = Setup::new(&format!("--device cuda {flags}")).start();
    assert_eq!(server.texts(&questions()), on_the_cpu(flags));
}

#[test]
fn greedy_tokens_of_int4_weights_are_the_same_recorded_and_launched() {
    let flags = "--device cuda --quantization int4";
    let recorded = Setup::new(flags).start().texts(&questions());
    let eager = Setup::new(&format!("{flags} --enforce-eager")).start().texts(&questions());
    assert_eq!(recorded, eager);
    // The CPU rounds activations beside such weights and a GPU does not, so only plain answers
    // are the same.
    assert_eq!(recorded[0], on_the_cpu("--quantization int4")[0]);
}
