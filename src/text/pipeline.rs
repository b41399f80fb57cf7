//! A model's text side in one value: what a prompt is, in token ids.
//!
//! Built from the files of a model folder by `model::open`'s caller; used on the blocking pool
//! by the engine's intake, because rendering and tokenizing a long prompt takes milliseconds.

use crate::request::{ChatPrompt, Prompt};
use crate::text::tokenizer_config::TokenizerConfig;
use crate::text::{ChatTemplate, TextError, Tokenizer};

/// Tokenizer and chat template of one model. Cloning shares them.
#[derive(Clone)]
pub struct TextPipeline {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    config: TokenizerConfig,
}

impl TextPipeline {
    /// Reads a model's files: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`.
    /// `override_template` replaces the model's own; else the `.jinja` file comes first.
    pub fn from_files(
        tokenizer_json: &[u8],
        tokenizer_config: Option<&str>,
        chat_template_jinja: Option<&str>,
        override_template: Option<&str>,
    ) -> Result<TextPipeline, TextError> {
        let tokenizer = Tokenizer::from_bytes(tokenizer_json)?;
        let config = tokenizer_config.map(TokenizerConfig::parse).transpose()?.unwrap_or_default();
        let single = override_template.or(chat_template_jinja);
        let tool_use = config.tool_use_template.as_deref().filter(|_| single.is_none());
        let source = single.or(config.chat_template.as_deref()).or(tool_use);
        let template = source
            .map(|source| {
                ChatTemplate::with_tool_use(source, tool_use, config.special_tokens.clone())
            })
            .transpose()?;
        Ok(TextPipeline { tokenizer, template, config })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// True when the model can be sent a conversation.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// The id of a special token by its role: `eos_token`, `bos_token`, ….
    pub fn special_token_id(&self, role: &str) -> Option<u32> {
        self.tokenizer.token_id(self.config.special_tokens.get(role)?)
    }

    /// A conversation as the text that the model sees.
    pub fn render(&self, chat: &ChatPrompt) -> Result<String, TextError> {
        self.template.as_ref().ok_or(TextError::NoChatTemplate)?.render(chat)
    }

    /// Any prompt as token ids. Ids are taken as they are: only the model knows its limits.
    pub fn prompt_token_ids(&self, prompt: &Prompt) -> Result<Vec<u32>, TextError> {
        match prompt {
            Prompt::Tokens(ids) => Ok(ids.clone()),
            Prompt::Text { text, add_special_tokens } => {
                self.tokenizer.encode(text, *add_special_tokens)
            }
            Prompt::Chat(chat) => {
                self.tokenizer.encode(&self.render(chat)?, chat.add_special_tokens)
            }
        }
    }
}
