//! Text to tokens and back: chat template, tokenizer, streaming decoder.

pub mod answer;
pub mod chat;
pub mod decode;
#[cfg(test)]
pub(crate) mod fixture;
pub mod grammar;
pub mod reasoning;
pub mod stop;
mod tags;
pub mod template;
#[cfg(test)]
mod tests;
pub mod tokenizer;
pub mod tool_calls;

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use self::chat::ChatTemplates;
use self::grammar::Grammars;
use self::template::{ChatInput, TemplateError};
use self::tokenizer::{Tokenizer, TokenizerError};

/// Largest `tokenizer.json`; Qwen's are 7 to 12 MB.
pub const MAX_TOKENIZER_BYTES: u64 = 64 << 20;
/// Largest of the other files.
pub const MAX_SIDE_FILE_BYTES: u64 = 4 << 20;

/// The text files of a checkpoint, as they are on disk.
#[derive(Clone, Debug, Default)]
pub struct TextFiles {
    /// `tokenizer.json`.
    pub tokenizer_json: Vec<u8>,
    /// `tokenizer_config.json`.
    pub tokenizer_config_json: Option<Vec<u8>>,
    /// `chat_template.jinja`; wins over the other two places.
    pub chat_template_jinja: Option<Vec<u8>>,
    /// `chat_template.json`: an object with `chat_template`.
    pub chat_template_json: Option<Vec<u8>>,
}

impl TextFiles {
    /// Reads them from a checkpoint's folder; only `tokenizer.json` has to be there.
    pub fn read(folder: &Path) -> Result<Self, TextError> {
        let optional = |name: &str| read_file(folder, name, MAX_SIDE_FILE_BYTES);
        Ok(Self {
            tokenizer_json: read_file(folder, "tokenizer.json", MAX_TOKENIZER_BYTES)?.ok_or_else(
                || TextError::Missing {
                    file: folder.join("tokenizer.json").display().to_string(),
                },
            )?,
            tokenizer_config_json: optional("tokenizer_config.json")?,
            chat_template_jinja: optional("chat_template.jinja")?,
            chat_template_json: optional("chat_template.json")?,
        })
    }
}

fn read_file(folder: &Path, name: &str, limit_bytes: u64) -> Result<Option<Vec<u8>>, TextError> {
    let path = folder.join(name);
    let failed = |source| TextError::Read {
        file: path.display().to_string(),
        source,
    };
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    // One byte more than allowed tells a file that is too large, whatever its size claims to be.
    file.take(limit_bytes + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > limit_bytes {
        return Err(TextError::TooLarge {
            file: path.display().to_string(),
            limit_bytes,
        });
    }
    Ok(Some(bytes))
}

/// Why a checkpoint's text files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file that has to be there is not.
    #[error("{file} is missing")]
    Missing {
        /// Its path.
        file: String,
    },
    /// A file cannot be read.
    #[error("cannot read {file}: {source}")]
    Read {
        /// Its path.
        file: String,
        /// The system's words.
        source: io::Error,
    },
    /// A file is larger than any real one.
    #[error("{file} is larger than {limit_bytes} bytes")]
    TooLarge {
        /// Its path.
        file: String,
        /// The limit.
        limit_bytes: u64,
    },
    /// A file is not the JSON it should be.
    #[error("{file}: {detail}")]
    Json {
        /// Its name.
        file: String,
        /// What is wrong.
        detail: String,
    },
    /// The tokenizer is unusable.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// Tokenizer and chat templates of the model that is served.
#[derive(Clone, Debug)]
pub struct Text {
    tokenizer: Arc<Tokenizer>,
    templates: Option<Result<Arc<ChatTemplates>, TemplateError>>,
    /// Made when they are first wanted: a large vocabulary takes a moment.
    grammars: Arc<OnceLock<Result<Grammars, String>>>,
}

impl Text {
    /// Checks and compiles `files` for a model with `vocab_size` logits. A template that does not
    /// compile is kept as an error for those who chat: the rest of the model is still of use.
    pub fn load(files: &TextFiles, vocab_size: usize) -> Result<Self, TextError> {
        let tokenizer = Tokenizer::from_json(&files.tokenizer_json, vocab_size)?;
        let templates = ChatTemplates::load(files)?.map(|loaded| loaded.map(Arc::new));
        Ok(Self {
            tokenizer: Arc::new(tokenizer),
            templates,
            grammars: Arc::default(),
        })
    }

    /// Grammars over the tokens of a model with these logits and ends.
    ///
    /// # Errors
    /// Why the model can have none.
    pub fn grammars(&self, vocab_size: usize, eos_token_ids: &[u32]) -> Result<&Grammars, String> {
        let make = || Grammars::new(&self.tokenizer, vocab_size, eos_token_ids);
        self.grammars
            .get_or_init(make)
            .as_ref()
            .map_err(Clone::clone)
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// The checkpoint has a chat template, usable or not.
    pub fn has_chat_template(&self) -> bool {
        self.templates.is_some()
    }

    /// False if there is a usable chat template and it leaves out the tools that it is given.
    pub fn takes_tools(&self) -> bool {
        let templates = self.templates.as_ref();
        templates.is_none_or(|templates| templates.as_ref().map_or(true, |it| it.takes_tools()))
    }

    /// There is a usable chat template, and `enable_thinking` changes what it writes.
    pub fn takes_thinking(&self) -> bool {
        matches!(&self.templates, Some(Ok(templates)) if templates.takes_thinking())
    }

    /// Why the chat template cannot be used, if it cannot: worth a warning at start.
    pub fn chat_template_error(&self) -> Option<&TemplateError> {
        self.templates.as_ref()?.as_ref().err()
    }

    /// The prompt text for a chat; `None` when the checkpoint has no chat template.
    pub fn render_chat(&self, input: &ChatInput) -> Option<Result<String, TemplateError>> {
        Some(match self.templates.as_ref()? {
            Ok(templates) => templates.render(input),
            Err(error) => Err(error.clone()),
        })
    }
}
