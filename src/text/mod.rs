//! Text on its way to token ids and back.
//!
//! Messages become a prompt ([`template`]), the prompt becomes ids ([`tokenizer`], both joined
//! in [`pipeline`]); generated ids become text again ([`detokenizer`]), which is searched for
//! stop strings ([`stop`]) and tool calls ([`tools`]) as it streams. Knows nothing of models,
//! schedulers or HTTP; everything here is synchronous and every type is cheap to hand to a
//! blocking thread.

pub mod detokenizer;
pub mod dummy;
pub mod error;
pub mod messages;
pub mod pipeline;
pub mod python;
pub mod stop;
pub mod template;
pub mod tokenizer;
pub mod tokenizer_config;
pub mod tools;

pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use pipeline::TextPipeline;
pub use stop::{StopMatcher, StopPush};
pub use template::ChatTemplate;
pub use tokenizer::Tokenizer;
pub use tools::{ToolCall, ToolCallParser, ToolEvent};
