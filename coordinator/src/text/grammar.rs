//! What an answer has to look like, and which tokens may come next for it to. The parser is `llguidance`'s;
//! this file says what grammar it is given, and bounds what one may cost.

use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::api::{GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory, regex_to_lark};
use secondwind_model::step::TokenSet;
use serde_json::{Value as Json, json};

use super::tokenizer::Tokenizer;

/// Text of a schema, an expression or a grammar, in bytes.
pub const MAX_GRAMMAR_BYTES: usize = 128 << 10;
/// Of the thread that compiles: the library recurses along chains of rules, which may be as long as the text
/// allows, and a stack that overflows ends the process. Only what is used of it is memory.
const STACK_BYTES: usize = 512 << 20;
/// White space between two parts of a JSON text: none, a space, or a new line and its indentation. Without a
/// bound, a model that knows no better may write nothing else up to the end of its context.
const JSON_WHITE_SPACE: &str = r" ?|\n[ \t]{0,20}";
/// Of what the library says, at the most.
const MAX_ERROR_CHARS: usize = 300;
const NOTHING: &str = "nothing can be written that has this shape";
/// Marks a token that stands for itself and not for its text.
const SPECIAL: u8 = TokTrie::SPECIAL_TOKEN_MARKER;

/// What an answer must look like.
#[derive(Clone, Debug, PartialEq)]
pub enum Shape {
    /// A JSON text that is valid under a JSON schema.
    JsonSchema(Json),
    /// A JSON object.
    JsonObject,
    /// What a regular expression matches as a whole.
    Regex(String),
    /// One of these.
    Choice(Vec<String>),
    /// What a grammar in Lark's syntax, as `llguidance` knows it, derives from `start`.
    Lark(String),
    /// Calls of tools as [`super::tool_calls`] reads them.
    ToolCalls {
        /// What may be called.
        tools: Vec<Tool>,
        /// More than one call may be made.
        several: bool,
    },
}

/// A tool that may be called.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// What it is called by.
    pub name: String,
    /// JSON schema of its arguments.
    pub parameters: Json,
}

/// What may come before the part of the answer that has a shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thinking {
    /// Nothing.
    No,
    /// Thoughts between their tags, or nothing.
    Possible,
    /// The rest of thoughts that the prompt has opened.
    Open,
}

impl Thinking {
    /// What may come first after a chat's prompt that ends with `prompt_end`.
    pub fn after(prompt_end: &str, tokenizer: &Tokenizer) -> Self {
        let end = prompt_end.trim_end();
        match tokenizer.added_token("<think>") {
            None => Self::No,
            Some(_) if end.ends_with("<think>") => Self::Open,
            Some(_) if end.ends_with("</think>") => Self::No,
            Some(_) => Self::Possible,
        }
    }
}

/// Makes grammars for the tokens of one model.
pub struct Grammars {
    factory: ParserFactory,
    compiling: Mutex<()>,
    /// Names of tokens that a grammar writes without quotes, such as `<think>`.
    special: Vec<String>,
}

impl Grammars {
    /// For a model with `vocab_size` logits and at least one end-of-sequence token.
    ///
    /// # Errors
    /// The library's words.
    pub fn new(
        tokenizer: &Tokenizer,
        vocab_size: usize,
        eos_token_ids: &[u32],
    ) -> Result<Self, String> {
        let ends: Vec<u32> = eos_token_ids
            .iter()
            .copied()
            .filter(|&id| (id as usize) < vocab_size)
            .collect();
        let &first = ends
            .first()
            .ok_or("the model has no end-of-sequence token, so no answer of a shape could end")?;
        let mut special = Vec::new();
        let words: Vec<Vec<u8>> = (0..vocab_size as u32)
            .map(|id| {
                let bytes = tokenizer.decode_token(id);
                if !tokenizer.is_added(id) {
                    return bytes.to_vec();
                }
                special.push(tokenizer.token_text(id));
                [&[SPECIAL], bytes].concat()
            })
            .collect();
        let info = TokRxInfo::new(vocab_size as u32, first);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(&ends);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&env).map_err(|error| error.to_string())?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            // No state of the parser in what a client reads.
            verbose_errors: false,
            // Every answer has its own, of a kilobyte or two each.
            max_lexer_states: 25_000,
            ..ParserLimits::default()
        };
        Ok(Self {
            factory,
            compiling: Mutex::default(),
            special,
        })
    }

    /// A grammar for one answer. Takes milliseconds for common schemas, up to seconds for what is refused
    /// as too complex.
    ///
    /// # Errors
    /// What is wrong with the shape.
    pub fn compile(&self, shape: &Shape, thinking: Thinking) -> Result<Grammar, String> {
        let source = self.source(shape, thinking)?;
        let vocab_size = self.factory.tok_env().tok_trie().vocab_size();
        let compile = || {
            let mut matcher = Matcher::new(self.factory.create_parser(source));
            if let Some(error) = matcher.get_error() {
                return Err(told(&error));
            }
            if matcher.is_stopped() {
                return Err(NOTHING.to_owned());
            }
            let mask = mask(&mut matcher, vocab_size)?;
            Ok((matcher, mask))
        };
        // One at a time: what a schema grows to in between is limited in steps, not in bytes.
        let _alone = self
            .compiling
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let compiled = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
            let thread = thread.spawn_scoped(scope, compile);
            let thread = thread.map_err(|error| format!("no thread to compile it: {error}"))?;
            thread.join().map_err(|_| "the parser gave up".to_owned())
        });
        let (matcher, mask) = compiled??;
        Ok(Grammar {
            matcher,
            mask,
            vocab_size,
        })
    }

    fn source(&self, shape: &Shape, thinking: Thinking) -> Result<TopLevelGrammar, String> {
        let mut parts = Vec::new();
        let answer = match shape {
            Shape::ToolCalls { tools, several } => self.calls(tools, *several, &mut parts)?,
            _ => {
                parts.push(named("answer", one(shape)?));
                "start: thinking @answer\n".to_owned()
            }
        };
        let thinking = match thinking {
            Thinking::No => "\"\"".to_owned(),
            Thinking::Possible => format!("({} thoughts)?", self.tag("<think>")),
            Thinking::Open => "thoughts".to_owned(),
        };
        // A token that stands for itself ends thoughts; a tag of letters does where it first comes.
        let thoughts = match self.is_special("</think>") {
            true => "thoughts: /(.|\\n)*/ </think> /\\n{0,2}/\n",
            false => "thoughts: rest /\\n{0,2}/\nrest[lazy]: /(.|\\n)*<\\/think>/\n",
        };
        let rules = format!("{answer}thinking: {thinking}\n{thoughts}");
        let whole = GrammarWithLexer::from_lark(rules);
        parts.insert(0, named("whole", whole));
        Ok(TopLevelGrammar {
            grammars: parts,
            max_tokens: None,
        })
    }

    /// The rules that derive calls of `tools`, whose schemas go to `parts`.
    fn calls(
        &self,
        tools: &[Tool],
        several: bool,
        parts: &mut Vec<GrammarWithLexer>,
    ) -> Result<String, String> {
        let mut rules = String::from("start: thinking call");
        if several {
            rules += " (\"\\n\" call)*";
        }
        let (open, close) = (self.tag("<tool_call>"), self.tag("</tool_call>"));
        let _ = write!(rules, "\ncall: {open} \"\\n\" what \"\\n\" {close}\nwhat: ");
        for (index, tool) in tools.iter().enumerate() {
            // The schema stays a whole of its own, which its references count from.
            let name = format!("tool_{index}");
            let or = if index == 0 { "" } else { " | " };
            let begin = format!("{{\"name\": {}, \"arguments\": ", json!(tool.name));
            let _ = write!(rules, "{or}{} @{name} \"}}\"", json!(begin));
            let arguments = json_grammar(object(tool.parameters.clone())?)
                .map_err(|error| format!("the tool {:?}: {error}", tool.name))?;
            parts.push(named(&name, arguments));
        }
        rules.push('\n');
        Ok(rules)
    }

    /// A tag in a rule: the token of that name, or its text where there is none.
    fn tag(&self, tag: &str) -> String {
        match self.is_special(tag) {
            true => tag.to_owned(),
            false => format!("\"{tag}\""),
        }
    }

    fn is_special(&self, tag: &str) -> bool {
        self.special.iter().any(|token| token == tag)
    }
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

fn named(name: &str, grammar: GrammarWithLexer) -> GrammarWithLexer {
    GrammarWithLexer {
        name: Some(name.to_owned()),
        ..grammar
    }
}

/// The grammar of a shape that is one.
fn one(shape: &Shape) -> Result<GrammarWithLexer, String> {
    match shape {
        Shape::JsonSchema(schema) => json_grammar(schema.clone()),
        Shape::JsonObject => json_grammar(json!({"type": "object"})),
        Shape::Regex(regex) => Ok(GrammarWithLexer::from_lark(format!(
            "start: /{}/\n",
            regex_to_lark(regex, "")
        ))),
        Shape::Choice(choices) => {
            let choices = choices.iter().map(|choice| json!(choice).to_string());
            let rule = choices.collect::<Vec<_>>().join(" | ");
            Ok(GrammarWithLexer::from_lark(format!("start: {rule}\n")))
        }
        Shape::Lark(lark) => Ok(GrammarWithLexer::from_lark(lark.clone())),
        Shape::ToolCalls { .. } => Err("calls are several grammars".to_owned()),
    }
}

/// The schema of arguments, which are an object whether it says so or not.
fn object(schema: Json) -> Result<Json, String> {
    match schema {
        Json::Bool(true) => Ok(json!({"type": "object"})),
        Json::Object(mut fields) => {
            let kind = fields.entry("type").or_insert_with(|| json!("object"));
            match kind == "object" {
                true => Ok(Json::Object(fields)),
                false => Err(format!("arguments are an object, and not of type {kind}")),
            }
        }
        _ => Err("a JSON schema is an object".to_owned()),
    }
}

fn json_grammar(mut schema: Json) -> Result<GrammarWithLexer, String> {
    const OPTIONS: &str = "x-guidance";
    match &mut schema {
        Json::Object(fields) => {
            if fields.contains_key(OPTIONS) {
                return Err(format!("{OPTIONS} is not for requests to set"));
            }
            let options = json!({ "whitespace_pattern": JSON_WHITE_SPACE });
            fields.insert(OPTIONS.to_owned(), options);
        }
        Json::Bool(_) => {}
        _ => return Err("a JSON schema is an object".to_owned()),
    }
    Ok(GrammarWithLexer::from_json_schema(schema))
}

/// Where one answer stands in its grammar.
pub struct Grammar {
    matcher: Matcher,
    mask: TokenSet,
    vocab_size: usize,
}

/// What may follow a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// One of these; never empty.
    Tokens(TokenSet),
    /// Nothing: the answer is whole.
    End,
}

impl Grammar {
    /// What the next token may be; never empty.
    pub fn mask(&self) -> &TokenSet {
        &self.mask
    }

    /// Takes in the token that was drawn. Takes up to milliseconds.
    ///
    /// # Errors
    /// The token was not to be drawn, or the grammar has become too complex to follow.
    pub fn accept(&mut self, token: u32) -> Result<Next, String> {
        let consumed = self.matcher.consume_token(token);
        consumed.map_err(|error| told(&error.to_string()))?;
        if self.matcher.is_stopped() {
            let reason = self.matcher.stop_reason();
            return match reason.is_ok() {
                true => Ok(Next::End),
                false => Err(reason.to_string()),
            };
        }
        self.mask = mask(&mut self.matcher, self.vocab_size)?;
        Ok(Next::Tokens(self.mask.clone()))
    }
}

impl Clone for Grammar {
    /// Its own from now on, for another answer to the same request.
    fn clone(&self) -> Self {
        Self {
            matcher: self.matcher.deep_clone(),
            mask: self.mask.clone(),
            vocab_size: self.vocab_size,
        }
    }
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Grammar").field(&self.mask).finish()
    }
}

fn mask(matcher: &mut Matcher, vocab_size: usize) -> Result<TokenSet, String> {
    let bits = matcher.compute_mask_or_eos();
    let bits = bits.map_err(|error| told(&error.to_string()))?;
    let mask = TokenSet::from_words(bits.as_slice(), vocab_size);
    match mask.is_empty() {
        true => Err("no token of the model's vocabulary can come next".to_owned()),
        false => Ok(mask),
    }
}

/// An error of the library in one line, without its note that it could say more.
fn told(error: &str) -> String {
    if error.starts_with("NoExtension") {
        return NOTHING.to_owned();
    }
    let lines = error.lines().map(str::trim);
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with("<non-verbose"));
    let line = lines.collect::<Vec<_>>().join("; ");
    // It may hold the whole grammar.
    match line.char_indices().nth(MAX_ERROR_CHARS) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
mod tests;
