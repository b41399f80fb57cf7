//! `GET /v1/models`.

use serde::Serialize;

/// A list in the style of the OpenAI API.
#[derive(Debug, Serialize)]
pub struct ModelList {
    object: &'static str,
    data: Vec<ModelCard>,
}

/// One served model.
#[derive(Debug, Serialize)]
pub struct ModelCard {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    parent: Option<String>,
    max_model_len: usize,
    permission: [Permission; 1],
}

/// Who may do what with a model; clients of the old API look for it.
#[derive(Debug, Serialize)]
struct Permission {
    id: String,
    object: &'static str,
    created: u64,
    allow_create_engine: bool,
    allow_sampling: bool,
    allow_logprobs: bool,
    allow_search_indices: bool,
    allow_view: bool,
    allow_fine_tuning: bool,
    organization: &'static str,
    group: Option<String>,
    is_blocking: bool,
}

impl ModelList {
    /// A list of these models.
    pub fn new(data: Vec<ModelCard>) -> ModelList {
        ModelList { object: "list", data }
    }
}

impl ModelCard {
    /// The card of a model under one of its public names.
    pub fn new(id: &str, root: &str, created: u64, max_model_len: usize) -> ModelCard {
        ModelCard {
            id: id.to_owned(),
            object: "model",
            created,
            owned_by: "tokenmill",
            root: root.to_owned(),
            parent: None,
            max_model_len,
            permission: [Permission {
                id: format!("modelperm-{id}"),
                object: "model_permission",
                created,
                allow_create_engine: false,
                allow_sampling: true,
                allow_logprobs: true,
                allow_search_indices: false,
                allow_view: true,
                allow_fine_tuning: false,
                organization: "*",
                group: None,
                is_blocking: false,
            }],
        }
    }
}
