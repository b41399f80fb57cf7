//! Models in folders: which file is missing, and which weights are used.

use tokenmill::checkpoint::bundled::{Bundle, TINY, TINY_DRAFT};
use tokenmill::checkpoint::files::{
    CONFIG, GENERATION_CONFIG, ModelFiles, TOKENIZER, TOKENIZER_CONFIG,
};
use tokenmill::checkpoint::hub::Progress;
use tokenmill::checkpoint::{CheckpointError, ExpectedTensor, TensorRole};
use tokenmill::config::{LoadFormat, ModelSource};
use tokenmill::model::check::check;
use tokenmill::model::spec::ModelSpec;
use tokenmill::tensor::DType;

fn open(path: &std::path::Path) -> Result<ModelFiles, CheckpointError> {
    ModelFiles::open(&ModelSource::Folder(path.to_owned()), Progress::Hidden)
}

#[test]
fn a_folder_that_does_not_exist_is_named() {
    let error = open("/no/such/model".as_ref()).err().unwrap();
    assert_eq!(
        error.to_string(),
        "/no/such/model is not a folder; give a folder with config.json or a hub id like owner/name"
    );
}

#[test]
fn a_missing_or_malformed_text_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let files = open(folder.path()).unwrap();
    assert!(files.text(CONFIG).is_none());
    let place = folder.path().display();
    let error = files.required_text(CONFIG).unwrap_err();
    assert_eq!(error.to_string(), format!("{place} has no config.json"));
    std::fs::write(folder.path().join(CONFIG), [0xff, 0xfe]).unwrap();
    let error = files.required_text(CONFIG).unwrap_err();
    assert!(error.to_string().starts_with("config.json is malformed"), "{error}");
    std::fs::write(folder.path().join(CONFIG), "{}").unwrap();
    assert_eq!(files.required_text(CONFIG).unwrap(), "{}");
}

#[test]
fn weights_are_read_or_made_up_as_asked() {
    let folder = tempfile::tempdir().unwrap();
    let files = open(folder.path()).unwrap();
    let expected =
        vec![ExpectedTensor { name: "w".to_owned(), shape: vec![3], role: TensorRole::Norm }];
    assert!(files.weights(LoadFormat::Auto, expected.clone(), DType::F32).is_err());
    let made_up = files.weights(LoadFormat::Dummy, expected, DType::F32).unwrap();
    assert_eq!(made_up.tensor("w").unwrap().as_slice::<f32>(), [1.0; 3]);
}

#[test]
fn bundled_models_are_whole_and_their_weights_are_used_in_place() {
    for bundle in [&TINY, &TINY_DRAFT] {
        let files = ModelFiles::Bundled(bundle);
        let spec = ModelSpec::from_config(&files.required_text(CONFIG).unwrap()).unwrap();
        for name in [TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG] {
            let text = files.required_text(name).unwrap();
            serde_json::from_str::<serde_json::Value>(&text).unwrap();
        }
        let weights = files.weights(LoadFormat::Auto, spec.expected_tensors(), spec.dtype).unwrap();
        check(&spec, &*weights).unwrap();
        let table = weights.tensor(&spec.embedding).unwrap();
        let first = table.as_slice::<half::bf16>().as_ptr().cast::<u8>();
        assert!(bundle.weights.as_ptr_range().contains(&first), "{}", bundle.name);
    }
}

#[test]
fn the_bundled_draft_speaks_the_vocabulary_of_its_target() {
    let spec =
        |bundle: &'static Bundle| ModelSpec::from_config(bundle.text(CONFIG).unwrap()).unwrap();
    assert_eq!(spec(&TINY).vocab_size, spec(&TINY_DRAFT).vocab_size);
    assert_eq!(spec(&TINY).eos_token_ids, spec(&TINY_DRAFT).eos_token_ids);
    let opened = ModelFiles::open(&ModelSource::Bundled, Progress::Hidden).unwrap();
    assert_eq!(opened.place(), "the bundled model tiny");
    assert!(matches!(opened, ModelFiles::Bundled(bundle) if bundle.name == TINY.name));
}
