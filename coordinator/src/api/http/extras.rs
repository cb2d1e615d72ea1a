//! Fields that a request may carry although we do nothing with them, and those that we refuse by name.

/// What is known of fields that a reader did not take.
pub(super) struct Extras {
    /// Changes the answer and is not supported: the field, and the values, as JSON, that change nothing.
    /// Null is always one.
    pub unsupported: &'static [(&'static str, &'static [&'static str])],
    /// Does not change the answer.
    pub hints: &'static [&'static str],
}

/// Of a request. A field that one endpoint reads never gets here from there, so one table serves all.
#[rustfmt::skip]
pub(super) const REQUEST: Extras = Extras {
    unsupported: &[
        // Sampling.
        ("length_penalty", &["1"]),
        ("repeat_penalty", &["1"]),
        ("no_repeat_ngram_size", &["0"]),
        ("max_new_tokens", &[]),
        ("n_predict", &["-1"]),
        ("best_of", &["1"]),
        ("use_beam_search", &["false"]),
        ("bad_words", &["[]"]),
        ("allowed_token_ids", &[]),
        ("logits_processors", &["[]"]),
        ("thinking_token_budget", &[]),
        // The prompt.
        ("suffix", &["\"\""]),
        ("echo", &["false"]),
        ("prompt_embeds", &[]),
        ("truncate_prompt_tokens", &[]),
        ("add_special_tokens", &[]),
        ("continue_final_message", &["false"]),
        ("chat_template", &[]),
        ("documents", &["[]"]),
        ("mm_processor_kwargs", &["{}"]),
        // Structured output, tools and reasoning.
        ("response_format", &[r#"{"type":"text"}"#]),
        ("structured_outputs", &[]),
        ("guided_json", &[]),
        ("guided_regex", &[]),
        ("guided_choice", &[]),
        ("guided_grammar", &[]),
        ("grammar", &["\"\""]),
        ("json_schema", &[]),
        ("tools", &["[]"]),
        ("tool_choice", &["\"none\"", "\"auto\""]),
        ("parallel_tool_calls", &["true"]),
        ("functions", &["[]"]),
        ("function_call", &["\"none\"", "\"auto\""]),
        ("reasoning_effort", &[]),
        ("enable_thinking", &[]),
        ("verbosity", &[]),
        ("web_search_options", &[]),
        // The answer.
        ("modalities", &[r#"["text"]"#]),
        ("audio", &[]),
        ("skip_special_tokens", &["true"]),
        ("include_stop_str_in_output", &["false"]),
        ("prompt_logprobs", &[]),
        ("top_logprobs", &[]),
        ("return_tokens_as_token_ids", &["false"]),
        ("return_token_ids", &["false"]),
    ],
    hints: &[
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "prediction", "spaces_between_special_tokens",
        "request_id",
    ],
};

/// Of a message.
pub(super) const MESSAGE: Extras = Extras {
    unsupported: &[
        ("audio", &[]),
        ("function_call", &[]),
        ("prefix", &["false"]),
    ],
    // No template of the models that are served writes the names.
    hints: &["name", "tool_call_id", "refusal", "annotations", "id"],
};

/// Of `stream_options`.
pub(super) const STREAM_OPTIONS: Extras = Extras {
    unsupported: &[("continuous_usage_stats", &["false"])],
    hints: &["include_obfuscation"],
};

/// Of a part of a message's content.
pub(super) const PART: Extras = Extras {
    unsupported: &[],
    hints: &["cache_control", "annotations"],
};

/// Of `response_format`.
pub(super) const RESPONSE_FORMAT: Extras = Extras {
    unsupported: &[],
    hints: &[],
};

/// Of `response_format.json_schema`. A shape is always kept to, strict or not.
pub(super) const JSON_SCHEMA: Extras = Extras {
    unsupported: &[],
    hints: &["name", "description", "strict"],
};

/// Of `structured_outputs`.
pub(super) const STRUCTURED_OUTPUTS: Extras = Extras {
    unsupported: &[
        ("structural_tag", &[]),
        ("whitespace_pattern", &[]),
        ("disable_any_whitespace", &["false"]),
        ("disable_additional_properties", &["false"]),
    ],
    hints: &["disable_fallback"],
};
