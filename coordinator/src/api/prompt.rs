//! A request's prompt to token ids.

use secondwind_proto::v1;
use secondwind_proto::v1::generate_request::Prompt;
use serde_json::{Map, Value as Json};

use super::frontend::ServedModel;
use super::request::{RequestError, check_ids};
use crate::text::template::ChatInput;

/// Template variables that a client may not set, and what to do instead.
const RESERVED_VARIABLES: [(&str, &str); 3] = [
    ("messages", "use the messages of the chat"),
    ("tools", "use the tools of the chat"),
    (
        "continue_final_message",
        "send the rendered text as text instead",
    ),
];

/// Token ids of the prompt: at least one, and short enough to leave room for one more.
pub(super) fn prompt_ids(
    prompt: Option<Prompt>,
    model: &ServedModel,
) -> Result<Vec<u32>, RequestError> {
    let (field, ids) = match prompt.ok_or(RequestError::NoPrompt)? {
        Prompt::TokenIds(ids) => {
            let field = "token_ids.ids";
            check_ids(field, &ids.ids, model.vocab_size)?;
            (field, ids.ids)
        }
        Prompt::Text(text) => ("text", encode("text", &text, true, model)?),
        Prompt::Chat(chat) => {
            // The template has already written the special tokens.
            ("chat", encode("chat", &render(chat, model)?, false, model)?)
        }
    };
    if ids.is_empty() {
        return Err(RequestError::EmptyPrompt { field });
    }
    if ids.len() >= model.max_context_tokens {
        return Err(RequestError::PromptTooLong {
            field,
            tokens: ids.len().to_string(),
            max_context_tokens: model.max_context_tokens,
        });
    }
    Ok(ids)
}

/// The text of a chat.
pub(super) fn render(chat: v1::ChatPrompt, model: &ServedModel) -> Result<String, RequestError> {
    let input = chat_input(chat)?;
    if input.tools.is_some() && !model.text.takes_tools() {
        return Err(RequestError::NoTools);
    }
    match model.text.render_chat(&input) {
        Some(rendered) => rendered.map_err(RequestError::Template),
        None => Err(RequestError::NoChatTemplate {
            model: model.name.clone(),
        }),
    }
}

fn encode(
    field: &'static str,
    text: &str,
    add_special_tokens: bool,
    model: &ServedModel,
) -> Result<Vec<u32>, RequestError> {
    let tokenizer = model.text.tokenizer();
    // A text that cannot fit, however well it packs, is not worth tokenizing. Normalisation may shorten a
    // text, but never to a quarter.
    let longest = 4 * tokenizer.max_token_bytes();
    if text.len() / longest > model.max_context_tokens {
        return Err(RequestError::PromptTooLong {
            field,
            tokens: format!("more than {}", model.max_context_tokens),
            max_context_tokens: model.max_context_tokens,
        });
    }
    tokenizer
        .encode(text, add_special_tokens)
        .map_err(|source| RequestError::Tokenize { field, source })
}

/// What the template is given.
fn chat_input(chat: v1::ChatPrompt) -> Result<ChatInput, RequestError> {
    if chat.messages.is_empty() {
        let field = "chat.messages".to_owned();
        return Err(RequestError::Empty { field });
    }
    let mut input = ChatInput {
        add_generation_prompt: true,
        ..ChatInput::default()
    };
    for (index, message) in chat.messages.into_iter().enumerate() {
        input.messages.push(template_message(index, message)?);
    }
    if !chat.tools_json.is_empty() {
        let tools = chat.tools_json.iter().enumerate().map(|(index, tool)| {
            let field = format!("chat.tools_json[{index}]");
            json_object(field, tool).map(Json::Object)
        });
        input.tools = Some(tools.collect::<Result<_, _>>()?);
    }
    if !chat.template_variables_json.is_empty() {
        let field = "chat.template_variables_json".to_owned();
        input.variables = json_object(field, &chat.template_variables_json)?;
        for (name, instead) in RESERVED_VARIABLES {
            if input.variables.contains_key(name) {
                let name = name.to_owned();
                return Err(RequestError::ReservedVariable { name, instead });
            }
        }
        match input.variables.remove("add_generation_prompt") {
            None => {}
            Some(Json::Bool(add)) => input.add_generation_prompt = add,
            Some(_) => {
                return Err(RequestError::Json {
                    field: "chat.template_variables_json".to_owned(),
                    detail: "add_generation_prompt is neither true nor false".to_owned(),
                });
            }
        }
    }
    Ok(input)
}

fn template_message(index: usize, message: v1::ChatMessage) -> Result<Json, RequestError> {
    if message.role.is_empty() {
        let field = format!("chat.messages[{index}].role");
        return Err(RequestError::Empty { field });
    }
    let mut fields = Map::from_iter([
        ("role".to_owned(), Json::from(message.role)),
        ("content".to_owned(), Json::from(message.content)),
    ]);
    if !message.reasoning_content.is_empty() {
        let reasoning = Json::from(message.reasoning_content);
        fields.insert("reasoning_content".to_owned(), reasoning);
    }
    if !message.tool_calls_json.is_empty() {
        let field = format!("chat.messages[{index}].tool_calls_json");
        let calls = match serde_json::from_str(&message.tool_calls_json) {
            Ok(calls @ Json::Array(_)) => calls,
            Ok(_) => return Err(not_json(field, "a JSON array")),
            Err(error) => return Err(bad_json(field, &error)),
        };
        fields.insert("tool_calls".to_owned(), calls);
    }
    Ok(Json::Object(fields))
}

fn json_object(field: String, text: &str) -> Result<Map<String, Json>, RequestError> {
    match serde_json::from_str(text) {
        Ok(Json::Object(object)) => Ok(object),
        Ok(_) => Err(not_json(field, "a JSON object")),
        Err(error) => Err(bad_json(field, &error)),
    }
}

fn not_json(field: String, wanted: &str) -> RequestError {
    RequestError::Json {
        field,
        detail: format!("is not {wanted}"),
    }
}

fn bad_json(field: String, error: &serde_json::Error) -> RequestError {
    RequestError::Json {
        field,
        detail: format!("is not JSON: {error}"),
    }
}
