//! Formats of tool calls.

/// A format of tool calls, shared by a family of models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ToolFamily {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>` (Hermes, Qwen).
    Hermes,
    /// `{"name": …, "parameters": {…}}` as the whole answer, after an optional `<|python_tag|>`.
    Llama3,
    /// `[TOOL_CALLS][{"name": …, "arguments": {…}}]`, in newer models `[TOOL_CALLS]name[ARGS]{…}`.
    Mistral,
    /// `{"name": …, "arguments": {…}}`, or a list of them, as the whole answer.
    Json,
}

impl ToolFamily {
    /// Detects the family from a template's source; `None` if it is none of these.
    pub fn detect(source: &str) -> Option<ToolFamily> {
        let has = |word: &str| source.contains(word);
        if has("[TOOL_CALLS]") {
            return Some(ToolFamily::Mistral);
        }
        // Calls in XML are also written between these tags; they are another format.
        let xml = ["<function=", "<arg_key>", "<invoke", "<parameter=", "<parameter "];
        if has("<tool_call>") && !xml.iter().any(|word| has(word)) {
            return Some(ToolFamily::Hermes);
        }
        // Other formats, although they contain JSON with the same keys.
        let foreign = [
            "<|tool_call",
            "<|channel|>",
            "<tool_call",
            "<tool_calls>",
            "tool▁call",
            "<function",
            "<|recipient|>",
            ">>>",
            "<|START_ACTION|>",
            "Action:",
            "<minimax:",
            "<|tools_prefix|>",
            "functools[",
            "DSML",
            "<TOOLCALL>",
            "<|open|>",
        ];
        if foreign.iter().any(|word| has(word)) {
            return None;
        }
        if has("<|python_tag|>") || (has("\"parameters\"") && has("<|start_header_id|>")) {
            return Some(ToolFamily::Llama3);
        }
        let keys = |text: &str| text.contains("name") && text.contains("arguments");
        let calls = source.find("tool_calls").map(|at| &source[at..]);
        calls.is_some_and(keys).then_some(ToolFamily::Json)
    }

    /// The text that begins a call, if the family has one.
    pub fn marker(self) -> Option<&'static str> {
        match self {
            ToolFamily::Hermes => Some("<tool_call>"),
            ToolFamily::Llama3 => Some("<|python_tag|>"),
            ToolFamily::Mistral => Some("[TOOL_CALLS]"),
            ToolFamily::Json => None,
        }
    }

    /// Whether a call may be JSON without a marker.
    pub(super) fn bare(self) -> bool {
        matches!(self, ToolFamily::Llama3 | ToolFamily::Json)
    }

    /// Whether calls may be in a JSON list.
    pub(super) fn lists(self) -> bool {
        matches!(self, ToolFamily::Mistral | ToolFamily::Json)
    }
}
