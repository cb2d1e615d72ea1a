//! Which chat template a checkpoint has, and the special tokens it may print.

use serde_json::{Map, Value as Json};

use super::template::{ChatInput, ChatTemplate, Limits, TemplateError};
use super::{TextError, TextFiles};

/// Special tokens that `transformers` passes to a template by name.
const SPECIAL_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// The templates of one checkpoint.
#[derive(Clone, Debug)]
pub struct ChatTemplates {
    default: ChatTemplate,
    tool_use: Option<ChatTemplate>,
    special_tokens: Map<String, Json>,
}

impl ChatTemplates {
    /// Finds and compiles them. `None`: the checkpoint has none. An inner error: it has one that cannot
    /// be used. An outer error: a file is not what it should be.
    #[allow(clippy::type_complexity)]
    pub fn load(files: &TextFiles) -> Result<Option<Result<Self, TemplateError>>, TextError> {
        let config = match &files.tokenizer_config_json {
            Some(bytes) => json_object("tokenizer_config.json", bytes)?,
            None => Map::new(),
        };
        let Some((file, sources)) = sources(files, &config)? else {
            return Ok(None);
        };
        let special_tokens = special_tokens(&config);
        Ok(Some(Self::compile(&file, sources, special_tokens)))
    }

    fn compile(
        file: &str,
        sources: Vec<(String, String)>,
        special_tokens: Map<String, Json>,
    ) -> Result<Self, TemplateError> {
        let compile = |wanted: &str| {
            let (name, source) = sources.iter().find(|(name, _)| name == wanted)?;
            let name = match sources.len() {
                1 => file.to_owned(),
                _ => format!("{file} ({name})"),
            };
            Some(ChatTemplate::compile(&name, source, Limits::default()))
        };
        let default = compile("default").ok_or_else(|| TemplateError::NoDefault {
            file: file.to_owned(),
            names: sources.iter().map(|(name, _)| name.clone()).collect(),
        })??;
        Ok(Self {
            default,
            tool_use: compile("tool_use").transpose()?,
            special_tokens,
        })
    }

    /// Tools that a template is given come into the prompt.
    pub fn takes_tools(&self) -> bool {
        self.tool_use.is_some() || self.default.reads("tools")
    }

    /// The variable `enable_thinking` is read.
    pub fn takes_thinking(&self) -> bool {
        self.default.reads("enable_thinking")
    }

    /// The prompt for `input`, from the template `tool_use` when there are tools and it exists.
    pub fn render(&self, input: &ChatInput) -> Result<String, TemplateError> {
        let template = match &self.tool_use {
            Some(tool_use) if input.tools.is_some() => tool_use,
            _ => &self.default,
        };
        template.render(&self.special_tokens, input)
    }
}

/// The file that holds the templates, and each with its name.
#[allow(clippy::type_complexity)]
fn sources(
    files: &TextFiles,
    config: &Map<String, Json>,
) -> Result<Option<(String, Vec<(String, String)>)>, TextError> {
    if let Some(bytes) = &files.chat_template_jinja {
        let file = "chat_template.jinja";
        let source = str::from_utf8(bytes).map_err(|error| TextError::Json {
            file: file.to_owned(),
            detail: format!("not UTF-8: {error}"),
        })?;
        let source = source.strip_prefix('\u{feff}').unwrap_or(source);
        let named = ("default".to_owned(), source.to_owned());
        return Ok(Some((file.to_owned(), vec![named])));
    }
    if let Some(template) = config.get("chat_template").filter(|json| !json.is_null()) {
        let file = "tokenizer_config.json";
        return Ok(Some((file.to_owned(), named_sources(file, template)?)));
    }
    if let Some(bytes) = &files.chat_template_json {
        let file = "chat_template.json";
        let object = json_object(file, bytes)?;
        let template = object.get("chat_template").unwrap_or(&Json::Null);
        return Ok(Some((file.to_owned(), named_sources(file, template)?)));
    }
    Ok(None)
}

fn named_sources(file: &str, template: &Json) -> Result<Vec<(String, String)>, TextError> {
    let wrong = || TextError::Json {
        file: file.to_owned(),
        detail: "chat_template is neither a text nor a list of {name, template}".to_owned(),
    };
    match template {
        Json::String(source) => Ok(vec![("default".to_owned(), source.clone())]),
        Json::Array(entries) => entries
            .iter()
            .map(|entry| {
                let text = |key: &str| entry.get(key)?.as_str().map(str::to_owned);
                text("name").zip(text("template")).ok_or_else(wrong)
            })
            .collect(),
        _ => Err(wrong()),
    }
}

/// Tokens given as a text or as an object with `content`.
fn special_tokens(config: &Map<String, Json>) -> Map<String, Json> {
    SPECIAL_TOKENS
        .iter()
        .filter_map(|name| {
            let token = config.get(*name)?;
            let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
            Some(((*name).to_owned(), Json::from(text)))
        })
        .collect()
}

fn json_object(file: &str, bytes: &[u8]) -> Result<Map<String, Json>, TextError> {
    let wrong = |detail: String| TextError::Json {
        file: file.to_owned(),
        detail,
    };
    match serde_json::from_slice(bytes) {
        Ok(Json::Object(object)) => Ok(object),
        Ok(_) => Err(wrong("not a JSON object".to_owned())),
        Err(error) => Err(wrong(format!("not JSON: {error}"))),
    }
}
