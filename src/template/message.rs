//! Input and output types of the output parser.

/// One increment of a message, as in OpenAI's streamed deltas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delta {
    Reasoning(String),
    Content(String),
    /// A call begins; `index` is its position among the calls of the message.
    ToolCallStart {
        index: usize,
        id: String,
        name: String,
    },
    /// The next piece of the JSON text of a call's arguments.
    ToolCallArguments {
        index: usize,
        json_fragment: String,
    },
}

/// The markers around reasoning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReasoningFormat {
    pub open: String,
    pub close: String,
    /// Whether the prompt ended inside the block, so that the output starts with reasoning.
    pub starts_open: bool,
}

/// Generator of tool-call ids: `call_` and 24 alphanumerics that depend on the seed and the count.
#[derive(Clone, Debug)]
pub struct CallIds(u64);

impl CallIds {
    /// Creates ids for one message; each message needs its own `seed`.
    pub fn new(seed: u64) -> Self {
        CallIds(seed)
    }

    /// The next id (splitmix64 for each 8 characters).
    pub fn next_id(&mut self) -> String {
        const ALPHABET: &[u8; 62] =
            b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
        let mut id = String::from("call_");
        for _ in 0..3 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            for _ in 0..8 {
                id.push(char::from(ALPHABET[(z % 62) as usize]));
                z /= 62;
            }
        }
        id
    }
}

/// A complete message, assembled from its deltas.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParsedMessage {
    pub reasoning: String,
    pub content: String,
    pub tool_calls: Vec<ParsedCall>,
}

/// One tool call of a [`ParsedMessage`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParsedCall {
    pub id: String,
    pub name: String,
    /// JSON text; it is valid unless generation stopped inside it.
    pub arguments: String,
}

impl ParsedMessage {
    /// Assembles a message from its deltas, in order.
    pub fn collect(deltas: impl IntoIterator<Item = Delta>) -> Self {
        let mut message = ParsedMessage::default();
        for delta in deltas {
            match delta {
                Delta::Reasoning(text) => message.reasoning += &text,
                Delta::Content(text) => message.content += &text,
                Delta::ToolCallStart { id, name, .. } => {
                    message.tool_calls.push(ParsedCall { id, name, arguments: String::new() });
                }
                Delta::ToolCallArguments { index, json_fragment } => {
                    if let Some(call) = message.tool_calls.get_mut(index) {
                        call.arguments += &json_fragment;
                    }
                }
            }
        }
        message
    }
}
