//! Models in folders: which file is missing, and which weights are used.

use tokenmill::checkpoint::files::{CONFIG, ModelFiles};
use tokenmill::checkpoint::hub::Progress;
use tokenmill::checkpoint::{CheckpointError, ExpectedTensor, TensorRole};
use tokenmill::config::{LoadFormat, ModelSource};
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
