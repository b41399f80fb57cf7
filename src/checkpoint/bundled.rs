//! The model inside the binary, so that a first start needs neither network nor flags.
//!
//! Its weights are used in place: they lie in the program's read-only pages, aligned as
//! kernels want them, and are never copied.

use super::files;

/// Bytes placed at the start of a cache line.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static TINY_WEIGHTS: &Aligned<[u8]> =
    &Aligned(*include_bytes!("../../models/tiny/model.safetensors"));

static DRAFT_WEIGHTS: &Aligned<[u8]> =
    &Aligned(*include_bytes!("../../models/tiny/draft/model.safetensors"));

const TOKENIZER: &str = include_str!("../../models/tiny/tokenizer.json");
const TOKENIZER_CONFIG: &str = include_str!("../../models/tiny/tokenizer_config.json");

/// The bundled chat model.
pub static TINY: Bundle = Bundle {
    name: "tiny",
    texts: &[
        (files::CONFIG, include_str!("../../models/tiny/config.json")),
        (files::GENERATION_CONFIG, include_str!("../../models/tiny/generation_config.json")),
        (files::TOKENIZER, TOKENIZER),
        (files::TOKENIZER_CONFIG, TOKENIZER_CONFIG),
    ],
    weights: &TINY_WEIGHTS.0,
};

/// A smaller model with the same tokenizer, which proposes tokens for [`TINY`].
pub static TINY_DRAFT: Bundle = Bundle {
    name: "tiny-draft",
    texts: &[
        (files::CONFIG, include_str!("../../models/tiny/draft/config.json")),
        (files::GENERATION_CONFIG, include_str!("../../models/tiny/draft/generation_config.json")),
        (files::TOKENIZER, TOKENIZER),
        (files::TOKENIZER_CONFIG, TOKENIZER_CONFIG),
    ],
    weights: &DRAFT_WEIGHTS.0,
};

/// The files of a model that lies in the binary.
pub struct Bundle {
    /// Name for messages.
    pub name: &'static str,
    /// Text files by name.
    pub texts: &'static [(&'static str, &'static str)],
    /// A whole safetensors file.
    pub weights: &'static [u8],
}

impl Bundle {
    /// The text of a file, if the model has it.
    pub fn text(&self, name: &str) -> Option<&'static str> {
        self.texts.iter().find(|(own, _)| *own == name).map(|(_, text)| *text)
    }
}
