//! The text layer from outside: ids to text, text to events, messages to prompts.
//!
//! What streams is checked against what the whole gives, for every way of cutting it.

mod detokenizer;
mod pipeline;
mod stop;
mod templates;
mod tokenizers_for_tests;
mod tools;
