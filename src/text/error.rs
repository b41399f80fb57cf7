//! What can go wrong between messages and token ids.

/// A failure of the text layer.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// `tokenizer.json` cannot be read.
    #[error("tokenizer.json is not usable: {reason}")]
    TokenizerFile {
        /// What the parser said.
        reason: String,
    },
    /// `tokenizer_config.json` cannot be read.
    #[error("tokenizer_config.json is not usable: {reason}")]
    TokenizerConfig {
        /// What the parser said.
        reason: String,
    },
    /// The tokenizer refused a text.
    #[error("the text cannot be tokenized: {reason}")]
    Encode {
        /// What the tokenizer said.
        reason: String,
    },
    /// A conversation was sent to a model that has no template for one.
    #[error(
        "this model has no chat template; send a plain prompt, or start the server with --chat-template"
    )]
    NoChatTemplate,
    /// The template does not parse.
    #[error("the chat template {name:?} does not parse: {reason}")]
    TemplateSyntax {
        /// Which of the model's templates.
        name: String,
        /// What the parser said, with the line.
        reason: String,
    },
    /// The template called `raise_exception`.
    #[error("the chat template refuses this conversation: {reason}")]
    TemplateRefused {
        /// The template's own words.
        reason: String,
    },
    /// The template failed on this conversation.
    #[error("the chat template failed on this conversation: {reason}")]
    TemplateRender {
        /// What the template engine said, with the line.
        reason: String,
    },
    /// A message holds something that is not text.
    #[error(
        "messages[{message}] has a content part of type {part_type:?}; this model reads only text"
    )]
    UnsupportedContent {
        /// Index of the message.
        message: usize,
        /// The part's `type`.
        part_type: String,
    },
    /// `continue_final_message` cannot be honoured.
    #[error("the final message cannot be continued: {reason}")]
    ContinueFinalMessage {
        /// Why.
        reason: &'static str,
    },
}

impl TextError {
    /// True when another request could have succeeded: the client's mistake, not ours.
    pub fn is_request_error(&self) -> bool {
        !matches!(
            self,
            TextError::TokenizerFile { .. }
                | TextError::TokenizerConfig { .. }
                | TextError::TemplateSyntax { .. }
        )
    }
}
