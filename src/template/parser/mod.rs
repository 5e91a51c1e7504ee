//! Incremental parser of a model's text into reasoning, content and tool calls.
//!
//! Every decision depends on the characters read, never on how they were cut into pieces. Text is
//! held back while it may be the beginning of a marker. Text that looks like a tool call but is
//! none is content.

use super::family::ToolFamily;
use super::json_scan::{CallEvent, CallObject, CallStep, JsonScan, Step};
use super::message::{CallIds, Delta, ParsedMessage, ReasoningFormat};

/// Maximum number of bytes that are read at once.
const PIECE: usize = 512;

/// Maximum number of bytes of a function's name, and of what may follow it before the arguments.
const MAX_NAME: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Only white space so far: bare JSON may begin.
    Start,
    Middle,
    /// After a tool call; white space is dropped.
    AfterCall,
}

#[derive(Clone, Debug)]
enum Mode {
    /// Before the first character that is not white space; reasoning may begin.
    Undecided,
    Reasoning {
        at_start: bool,
    },
    Content(Place),
    Call(Call),
}

/// State of a call, from its trigger on.
#[derive(Clone, Debug)]
struct Call {
    /// The trigger and the white space before it, in case they turn out to be content.
    raw: String,
    /// Number of bytes at the beginning that are content for certain if this is not a call.
    certain: usize,
    /// Inside `[ … ]`.
    list: bool,
    phase: Phase,
}

#[derive(Clone, Debug)]
enum Phase {
    Open,
    Object(CallObject),
    /// Mistral's `name[ARGS]`.
    Name,
    /// Mistral's `{…}` after a name.
    Arguments(JsonScan),
    /// Between the items of a list.
    Between,
    /// Before Hermes' closing marker.
    Close,
}

/// An incremental parser of one message.
#[derive(Debug)]
pub struct OutputParser {
    family: Option<ToolFamily>,
    reasoning: Option<ReasoningFormat>,
    parallel: bool,
    ids: CallIds,
    mode: Mode,
    /// Text that is not yet classified.
    pending: String,
    /// White space that is emitted only if other text follows it.
    spaces: String,
    /// Number of calls that have begun, including those that were not emitted.
    calls: usize,
    /// Number of calls that were emitted.
    told: usize,
    /// The emitted calls that are complete.
    complete: Vec<CallText>,
    /// The call that is being read.
    current: Option<Current>,
    /// Whether a call was repeated word for word.
    repeats: bool,
    /// Whether the beginning of a call was cut off and dropped.
    dropped: bool,
    /// Whether the answer is constrained to calls and has no other text.
    must_call: bool,
    out: Vec<Delta>,
}

/// A call in the form in which calls are compared: the name, and the arguments without white space
/// between their tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct CallText {
    name: String,
    arguments: String,
    in_string: bool,
    escaped: bool,
}

impl CallText {
    fn push(&mut self, fragment: &str) {
        for c in fragment.chars() {
            if self.in_string || !c.is_whitespace() {
                self.arguments.push(c);
            }
            match c {
                _ if self.escaped => self.escaped = false,
                '\\' if self.in_string => self.escaped = true,
                '"' => self.in_string = !self.in_string,
                _ => {}
            }
        }
    }

    /// Whether the other call begins with everything that this one has so far.
    fn begins(&self, other: &CallText) -> bool {
        self.name == other.name && other.arguments.starts_with(&self.arguments)
    }
}

/// A call that is being read.
#[derive(Debug)]
struct Current {
    text: CallText,
    /// The arguments so far of a call that may still turn out to repeat an earlier one. Such a call
    /// is not emitted.
    held: Option<String>,
    /// Whether the call is not emitted at all, because only one call is allowed.
    dropped: bool,
}

impl OutputParser {
    /// Creates a parser for one message. Without `tools_enabled` all text is content; without
    /// `parallel` calls after the first are dropped.
    pub fn new(
        family: Option<ToolFamily>,
        reasoning: Option<ReasoningFormat>,
        tools_enabled: bool,
        parallel: bool,
        ids: CallIds,
    ) -> Self {
        let mode = match &reasoning {
            Some(format) if format.starts_open => Mode::Reasoning { at_start: true },
            Some(_) => Mode::Undecided,
            None => Mode::Content(Place::Start),
        };
        OutputParser {
            family: family.filter(|_| tools_enabled),
            reasoning,
            parallel,
            ids,
            mode,
            pending: String::new(),
            spaces: String::new(),
            calls: 0,
            told: 0,
            complete: Vec::new(),
            current: None,
            repeats: false,
            dropped: false,
            must_call: false,
            out: Vec::new(),
        }
    }

    /// Sets whether the answer is constrained to calls, so that any beginning is that of a call.
    #[must_use]
    pub fn must_call(mut self, must_call: bool) -> Self {
        self.must_call = must_call;
        self
    }

    /// Reads the next piece of text.
    pub fn push(&mut self, text: &str) -> Vec<Delta> {
        // In short pieces, so that the time is linear in the length even for many broken markers.
        let mut rest = text;
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(rest.floor_char_boundary(PIECE));
            self.pending.push_str(piece);
            self.run(false);
            rest = after;
        }
        self.take()
    }

    /// Ends the text and classifies all pending text. If the model has ended by itself inside what
    /// looked like a call, that is content. If the output was cut off (`cut`), the beginning of a
    /// call is dropped.
    pub fn finish(&mut self, cut: bool) -> Vec<Delta> {
        if cut {
            self.drop_unfinished();
        }
        self.run(true);
        self.take()
    }

    /// Whether at least one call was emitted and all emitted calls are complete.
    pub fn calls_are_complete(&self) -> bool {
        self.told > 0 && self.told == self.complete.len()
    }

    /// Whether a call has begun, emitted or not.
    pub fn saw_a_call(&self) -> bool {
        self.calls > 0 || self.dropped
    }

    /// Whether the model has repeated one of its calls. The repetition is not emitted; the model is
    /// in a loop, so no new output is expected.
    pub fn repeats_itself(&self) -> bool {
        self.repeats
    }

    /// Drops a call that has begun but was not emitted, and the beginning of a marker.
    fn drop_unfinished(&mut self) {
        self.run(false);
        match &self.mode {
            Mode::Call(call)
                if !call.started() && (self.must_call || call.certain_call(self.family)) =>
            {
                self.pending.clear();
                self.spaces.clear();
                self.dropped = true;
                self.mode = Mode::Content(Place::AfterCall);
            }
            Mode::Content(_) => {
                let marker = self.family.and_then(ToolFamily::marker);
                let half = marker.map_or(0, |marker| partial_suffix(&self.pending, marker));
                // A single character is too short to be taken for a marker, unless all text is
                // calls.
                if half > usize::from(!self.must_call) {
                    self.pending.truncate(self.pending.len() - half);
                    self.spaces.clear();
                    self.dropped = true;
                }
            }
            _ => {}
        }
    }

    /// Parses a whole text at once.
    pub fn parse(mut self, text: &str) -> ParsedMessage {
        let mut deltas = self.push(text);
        deltas.extend(self.finish(false));
        ParsedMessage::collect(deltas)
    }

    /// Takes the deltas so far; adjacent deltas of one kind are joined.
    fn take(&mut self) -> Vec<Delta> {
        let mut deltas: Vec<Delta> = Vec::new();
        for delta in self.out.drain(..) {
            match (deltas.last_mut(), delta) {
                (Some(Delta::Content(a)), Delta::Content(b))
                | (Some(Delta::Reasoning(a)), Delta::Reasoning(b)) => a.push_str(&b),
                (
                    Some(Delta::ToolCallArguments { index: i, json_fragment: a }),
                    Delta::ToolCallArguments { index: j, json_fragment: b },
                ) if *i == j => a.push_str(&b),
                (_, delta) => deltas.push(delta),
            }
        }
        deltas
    }

    fn run(&mut self, end: bool) {
        // Every iteration consumes text or changes to a mode that does.
        while match self.mode {
            Mode::Undecided => self.undecided(end),
            Mode::Reasoning { at_start } => self.reasoning(at_start, end),
            Mode::Content(place) => self.content(place, end),
            Mode::Call(_) => self.call(end),
        } {}
    }

    fn undecided(&mut self, end: bool) -> bool {
        let Some(format) = &self.reasoning else { return self.go(Mode::Content(Place::Start)) };
        let text = self.pending.trim_start();
        if let Some(rest) = text.strip_prefix(format.open.as_str()) {
            self.pending = rest.to_owned();
            return self.go(Mode::Reasoning { at_start: true });
        }
        if !end && format.open.starts_with(text) {
            return false;
        }
        self.go(Mode::Content(Place::Start))
    }

    fn reasoning(&mut self, at_start: bool, end: bool) -> bool {
        let Some(format) = &self.reasoning else { return self.go(Mode::Content(Place::Start)) };
        if at_start {
            // Some models open the block again although the prompt has opened it.
            let mut rest = self.pending.trim_start();
            while let Some(after) = rest.strip_prefix(format.open.as_str()) {
                rest = after.trim_start();
            }
            self.pending = rest.to_owned();
            if self.pending.is_empty() || (!end && format.open.starts_with(&self.pending)) {
                return false;
            }
        }
        let close = format.close.clone();
        let (text, closed) = match self.pending.find(&close) {
            Some(at) => (at, true),
            None if end => (self.pending.len(), false),
            None => (self.pending.len() - partial_suffix(&self.pending, &close), false),
        };
        let text: String = self.pending.drain(..text).collect();
        self.emit_text(&text, Delta::Reasoning);
        if closed {
            self.pending.drain(..close.len());
            self.spaces.clear();
            // The white space after the block is part of the template, not of the answer.
            return self.go(Mode::Content(Place::AfterCall));
        }
        if !text.is_empty() {
            self.mode = Mode::Reasoning { at_start: false };
        }
        false
    }

    fn content(&mut self, place: Place, end: bool) -> bool {
        if place != Place::Middle {
            let start = self.pending.len() - self.pending.trim_start().len();
            let spaces: String = self.pending.drain(..start).collect();
            if place == Place::Start {
                self.spaces.push_str(&spaces);
            }
            if self.pending.is_empty() {
                if end {
                    self.flush_spaces();
                }
                return false;
            }
        }
        let Some(family) = self.family else {
            let text = std::mem::take(&mut self.pending);
            self.flush_spaces();
            self.emit(Delta::Content(text));
            self.mode = Mode::Content(Place::Middle);
            return false;
        };
        if place != Place::Middle && family.bare() {
            match self.bare_start(place, end) {
                Some(true) => return true,
                Some(false) => {}
                None => return false,
            }
        }
        let marker = family.marker();
        let found = marker.and_then(|marker| self.pending.find(marker));
        let text = match (found, marker) {
            (Some(at), _) => at,
            (None, Some(marker)) if !end => {
                self.pending.len() - partial_suffix(&self.pending, marker)
            }
            _ => self.pending.len(),
        };
        let text: String = self.pending.drain(..text).collect();
        self.emit_text(&text, Delta::Content);
        if let (Some(_), Some(marker)) = (found, marker) {
            self.pending.drain(..marker.len());
            let raw = std::mem::take(&mut self.spaces) + marker;
            let certain = raw.len();
            return self.go(Mode::Call(Call::new(raw, certain)));
        }
        if end {
            self.flush_spaces();
        }
        if !text.is_empty() {
            self.mode = Mode::Content(Place::Middle);
        }
        false
    }

    /// Whether bare JSON begins here; `None` if more text is needed.
    fn bare_start(&mut self, place: Place, end: bool) -> Option<bool> {
        // Between calls models write `;`, `,` or a line break.
        let after_separator = match place {
            Place::AfterCall if self.calls > 0 => self.pending.strip_prefix([';', ',']),
            _ => None,
        };
        let text = after_separator.map_or(self.pending.as_str(), str::trim_start);
        let first = match text.chars().next() {
            Some(first) => first,
            None if end => return Some(false),
            None => return None,
        };
        if !(first == '{' || (first == '[' && self.family == Some(ToolFamily::Json))) {
            return Some(false);
        }
        let skipped = self.pending.len() - text.len();
        let raw = std::mem::take(&mut self.spaces) + &self.pending[..skipped];
        self.pending.drain(..skipped);
        let certain = raw.len() + 1;
        self.mode = Mode::Call(Call::new(raw, certain));
        Some(true)
    }

    /// Continues reading a call, as far as the text goes.
    fn call(&mut self, end: bool) -> bool {
        let Mode::Call(mut call) = std::mem::replace(&mut self.mode, Mode::Content(Place::Middle))
        else {
            return false;
        };
        let (Some(family), pending) = (self.family, std::mem::take(&mut self.pending)) else {
            return false;
        };
        let (mut events, mut rest) = (Vec::new(), pending.as_str());
        let outcome = loop {
            let (outcome, used) = call.read(family, rest, end, &mut events);
            call.raw.push_str(&rest[..used]);
            rest = &rest[used..];
            if outcome != Outcome::More || used == 0 {
                break outcome;
            }
        };
        rest.clone_into(&mut self.pending);
        self.emit_events(events);
        match outcome {
            Outcome::Done => self.go(Mode::Content(Place::AfterCall)),
            Outcome::More if !end => {
                self.mode = Mode::Call(call);
                false
            }
            // The start of the call was emitted: what follows the error is content.
            _ if call.started() => true,
            _ => {
                let text = call.raw + &self.pending;
                let certain = text.get(..call.certain).unwrap_or(&text).len();
                self.flush_spaces();
                self.emit(Delta::Content(text[..certain].to_owned()));
                text[certain..].clone_into(&mut self.pending);
                true
            }
        }
    }

    fn go(&mut self, mode: Mode) -> bool {
        self.mode = mode;
        true
    }

    fn emit(&mut self, delta: Delta) {
        self.out.push(delta);
    }

    /// Emits text except its trailing white space, which is held until more text follows.
    fn emit_text(&mut self, text: &str, delta: fn(String) -> Delta) {
        let solid = text.trim_end();
        if !solid.is_empty() {
            let spaces = std::mem::take(&mut self.spaces);
            self.emit(delta(spaces + solid));
        }
        self.spaces.push_str(&text[solid.len()..]);
    }

    fn flush_spaces(&mut self) {
        if !self.spaces.is_empty() {
            let spaces = std::mem::take(&mut self.spaces);
            self.emit(Delta::Content(spaces));
        }
    }

    fn emit_events(&mut self, events: Vec<CallEvent>) {
        for event in events {
            match event {
                CallEvent::Start(name) => {
                    let text = CallText { name, ..CallText::default() };
                    let dropped = self.calls > 0 && !self.parallel;
                    let held = self.complete.iter().any(|call| text.begins(call));
                    self.calls += 1;
                    if !held && !dropped {
                        self.emit_start(&text.name);
                    }
                    let held = (held && !dropped).then(String::new);
                    self.current = Some(Current { text, held, dropped });
                }
                CallEvent::Arguments(json_fragment) => {
                    let Some(mut call) = self.current.take() else { continue };
                    if !call.dropped {
                        call.text.push(&json_fragment);
                        self.emit_arguments(&mut call, json_fragment);
                    }
                    self.current = Some(call);
                }
                CallEvent::End => {
                    let Some(call) = self.current.take().filter(|call| !call.dropped) else {
                        continue;
                    };
                    // The arguments equal those of an earlier call to the end.
                    match call.held {
                        Some(_) => self.repeats = true,
                        None => self.complete.push(call.text),
                    }
                }
            }
        }
    }

    fn emit_start(&mut self, name: &str) {
        let (index, id) = (self.told, self.ids.next_id());
        self.told += 1;
        self.emit(Delta::ToolCallStart { index, id, name: name.to_owned() });
    }

    /// Emits the next piece of a call's arguments, once the call differs from all earlier calls.
    fn emit_arguments(&mut self, call: &mut Current, fragment: String) {
        let json_fragment = match &mut call.held {
            None => fragment,
            Some(held) => {
                held.push_str(&fragment);
                if self.complete.iter().any(|other| call.text.begins(other)) {
                    return;
                }
                let held = call.held.take().unwrap_or_default();
                self.emit_start(&call.text.name);
                held
            }
        };
        self.emit(Delta::ToolCallArguments { index: self.told - 1, json_fragment });
    }
}

/// Result of reading a part of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// The call is incomplete; if nothing was read, more text is needed.
    More,
    Done,
    Failed,
}

impl Call {
    fn new(raw: String, certain: usize) -> Self {
        Call { raw, certain, list: false, phase: Phase::Open }
    }

    /// Whether a part of the call was emitted and cannot be taken back.
    fn started(&self) -> bool {
        match &self.phase {
            Phase::Object(object) => object.started(),
            Phase::Arguments(_) | Phase::Between | Phase::Close => true,
            Phase::Open | Phase::Name => false,
        }
    }

    /// Whether only a call can begin like this.
    fn certain_call(&self, family: Option<ToolFamily>) -> bool {
        match family {
            Some(family) if family.bare() => {
                let text: String = self.raw.chars().filter(|c| !c.is_whitespace()).collect();
                let text = text.trim_start_matches(['[', ';', ',']);
                ["{\"name\"", "<|python_tag|>"].iter().any(|begin| text.starts_with(begin))
            }
            _ => true,
        }
    }

    /// Reads a character or a marker of `text`; also returns the number of bytes read.
    fn read(
        &mut self,
        family: ToolFamily,
        text: &str,
        end: bool,
        events: &mut Vec<CallEvent>,
    ) -> (Outcome, usize) {
        match &mut self.phase {
            Phase::Close => return read_close(text, end),
            Phase::Name => return self.read_name(text, events),
            _ => {}
        }
        let Some(c) = text.chars().next() else { return (Outcome::More, 0) };
        let one = c.len_utf8();
        match &mut self.phase {
            Phase::Open | Phase::Between if c.is_whitespace() => (Outcome::More, one),
            Phase::Open if c == '{' => {
                let mut object = CallObject::new(family.bare());
                object.push(c, events);
                self.phase = Phase::Object(object);
                (Outcome::More, one)
            }
            Phase::Open if c == '[' && !self.list && family.lists() => {
                self.list = true;
                (Outcome::More, one)
            }
            Phase::Open if is_name(c) && family == ToolFamily::Mistral && !self.list => {
                self.phase = Phase::Name;
                self.read_name(text, events)
            }
            Phase::Object(object) => match object.push(c, events) {
                CallStep::More => (Outcome::More, one),
                CallStep::Failed => (Outcome::Failed, 0),
                CallStep::Done => {
                    events.push(CallEvent::End);
                    match () {
                        () if self.list => self.phase = Phase::Between,
                        () if family == ToolFamily::Hermes => self.phase = Phase::Close,
                        () => return (Outcome::Done, one),
                    }
                    (Outcome::More, one)
                }
            },
            Phase::Arguments(scan) => match scan.push(c) {
                Step::Error | Step::EndBefore => (Outcome::Failed, 0),
                step => {
                    events.push(CallEvent::Arguments(c.into()));
                    if step != Step::End {
                        return (Outcome::More, one);
                    }
                    events.push(CallEvent::End);
                    (Outcome::Done, one)
                }
            },
            Phase::Between if c == ',' => {
                // The previous call was emitted; only the next one can still become content.
                *self = Call { list: true, ..Call::new(String::new(), 0) };
                (Outcome::More, one)
            }
            Phase::Between if c == ']' => (Outcome::Done, one),
            Phase::Between => (Outcome::Done, 0),
            _ => (Outcome::Failed, 0),
        }
    }

    /// Reads Mistral's `name[ARGS]` up to the `{`; also `name[CALL_ID]id[ARGS]` and `name{`.
    fn read_name(&mut self, text: &str, events: &mut Vec<CallEvent>) -> (Outcome, usize) {
        let rest = text.trim_start_matches(is_name);
        let name = &text[..text.len() - rest.len()];
        let id = rest.strip_prefix("[CALL_ID]").map(|id| id.trim_start_matches(is_name));
        let rest = id.unwrap_or(rest);
        let arguments = rest.strip_prefix("[ARGS]").unwrap_or(rest).trim_start();
        if text.len() - arguments.len() > MAX_NAME {
            return (Outcome::Failed, 0);
        }
        if arguments.starts_with('{') {
            self.phase = Phase::Arguments(JsonScan::new());
            events.push(CallEvent::Start(name.to_owned()));
            return (Outcome::More, text.len() - arguments.len());
        }
        let waits = text.len() <= MAX_NAME
            && (arguments.is_empty()
                || "[ARGS]".starts_with(rest)
                || (id.is_none() && "[CALL_ID]".starts_with(rest)));
        (if waits { Outcome::More } else { Outcome::Failed }, 0)
    }
}

/// Reads Hermes' closing marker. A missing marker is accepted.
fn read_close(text: &str, end: bool) -> (Outcome, usize) {
    const CLOSE: &str = "</tool_call>";
    let rest = text.trim_start();
    match rest.strip_prefix(CLOSE) {
        Some(after) => (Outcome::Done, text.len() - after.len()),
        None if CLOSE.starts_with(rest) && end => (Outcome::Done, text.len()),
        None if CLOSE.starts_with(rest) => (Outcome::More, 0),
        None => (Outcome::Done, 0),
    }
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.')
}

/// Length of the longest suffix of `text` that may be the beginning of `marker`.
fn partial_suffix(text: &str, marker: &str) -> usize {
    (1..marker.len())
        .rev()
        .filter(|n| *n <= text.len() && text.is_char_boundary(text.len() - n))
        .find(|n| marker.starts_with(&text[text.len() - n..]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests;
