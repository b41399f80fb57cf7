//! The recorded cases: a model, a prompt, and what transformers computed for it.

use std::path::PathBuf;

use tokenmill::checkpoint::{Checkpoint, TensorSource};
use tokenmill::tensor::Tensor;

/// One recorded case.
pub struct Case {
    /// Name of its folder.
    pub name: String,
    /// Where config.json and model.safetensors are.
    pub folder: PathBuf,
    /// Text of config.json.
    pub config_json: String,
    /// The prompt.
    pub token_ids: Vec<u32>,
    /// `[prompt_len, vocab_size]`, f32.
    pub logits: Tensor,
    /// Positions at which the rotary tables were recorded.
    pub positions: Vec<u32>,
    /// `[num_positions, head_dim / 2]`, f32.
    pub cos: Tensor,
    /// `[num_positions, head_dim / 2]`, f32.
    pub sin: Tensor,
}

impl Case {
    /// Reads the case of this name.
    pub fn named(name: &str) -> Case {
        let folder = all_cases_folder().join(name);
        let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
        let expected = Checkpoint::from_static(bytes.leak(), "expected.safetensors").unwrap();
        let numbers = |name: &str| expected.tensor(name).unwrap().as_slice::<u32>().to_vec();
        Case {
            name: name.to_owned(),
            config_json: std::fs::read_to_string(folder.join("config.json")).unwrap(),
            token_ids: numbers("token_ids"),
            logits: expected.tensor("logits").unwrap(),
            positions: numbers("positions"),
            cos: expected.tensor("cos").unwrap(),
            sin: expected.tensor("sin").unwrap(),
            folder,
        }
    }

    /// All cases, sorted by name.
    pub fn all() -> Vec<Case> {
        let mut names: Vec<String> = std::fs::read_dir(all_cases_folder())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert!(names.len() >= 16, "recorded cases are missing: {names:?}");
        names.iter().map(|name| Case::named(name)).collect()
    }

    /// The recorded logits after the first `prompt_len` tokens.
    pub fn logits_after(&self, prompt_len: usize) -> &[f32] {
        self.logits.view().rows(prompt_len - 1..prompt_len).as_slice()
    }
}

fn all_cases_folder() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/parity/recorded"))
}
