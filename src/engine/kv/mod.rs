//! Bookkeeping of the KV cache: the pages that a sequence owns, shares, or leaves cached.
//!
//! `free + cached + held = total` at all times: `free` pages are in the pool, `cached` pages are
//! referenced only by the prefix index, `held` pages by at least one running sequence.
//!
//! A runner whose cache is not addressed by pages (llama.cpp) stores a page's contents in the
//! sequence slots that computed it. For such a runner a finished sequence keeps its slot as a
//! *resident*, and the bookkeeping records the slots that hold each node; [`SlotChange`]s tell the
//! runner which contents to drop when pages are evicted.
//!
//! Prefix sharing is exact to the token: a partially matching page is taken from the slot that
//! holds it, or copied.

mod pool;
mod prefix;
#[cfg(test)]
mod tests;

pub use pool::{Hold, Page, PagePool};
pub use prefix::{CacheKey, NodeId, PrefixIndex};

use crate::engine::runner::{ModelRunner, PAGE_TOKENS, SeqSlot};
use crate::ipc::Token;
use std::collections::{BTreeMap, HashMap};

/// A change that the runner must apply to keep its cache consistent with this bookkeeping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotChange {
    /// Copies the first tokens of one slot to another, empty slot: (from, to, number of tokens).
    Fork(SeqSlot, SeqSlot, usize),
    Truncate(SeqSlot, usize),
    Release(SeqSlot),
    /// For a runner with real pages: copies the contents of one page to another.
    CopyPage(u32, u32),
}

/// The pages of one running sequence.
#[derive(Debug)]
pub struct SequencePages {
    pub slot: SeqSlot,
    key: CacheKey,
    pages: Vec<Hold>,
    /// Nodes of the first pages; the pages after them are private.
    path: Vec<NodeId>,
    /// Number of nodes in `path` whose contents are computed.
    computed: usize,
    /// Another sequence registered the same tokens first: later pages stay private.
    diverged: bool,
}

impl SequencePages {
    pub fn page_ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.pages.iter().map(|hold| hold.page().id())
    }

    /// Tokens that fit into the pages allocated so far.
    pub fn capacity(&self) -> usize {
        self.pages.len() * PAGE_TOKENS
    }
}

/// The prefix match of a prompt, in whole pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrefixMatch {
    /// Tokens whose pages are computed.
    pub cached: usize,
    /// The part of `cached` whose pages are held by running sequences: sharing them takes no
    /// further page.
    pub held: usize,
    /// Further tokens that a running sequence is computing: worth waiting for.
    pub pending: usize,
}

/// The pages of an admitted sequence, including shared ones.
#[derive(Debug)]
pub struct Admission {
    pub pages: SequencePages,
    /// Tokens that are already computed.
    pub cached: usize,
}

#[derive(Debug)]
pub struct KvCacheManager {
    pool: PagePool,
    index: PrefixIndex,
    /// Whether the runner stores page contents in slots (llama.cpp).
    slots_hold_pages: bool,
    shares_prefixes: bool,
    /// Sorted with the highest slot first: the lowest is allocated next, so that slots in use stay
    /// adjacent.
    free_slots: Vec<SeqSlot>,
    /// Slots of finished sequences that hold cached pages. Each maps to its deepest node, which no
    /// other slot holds.
    residents: BTreeMap<SeqSlot, NodeId>,
    /// The running or resident slots that hold a node's page.
    holders: HashMap<NodeId, Vec<SeqSlot>>,
    changes: Vec<SlotChange>,
}

impl KvCacheManager {
    /// `slots` is the number of sequences that the runner can hold, running and resident together.
    pub fn new(pages: u32, slots: u32, slots_hold_pages: bool, shares_prefixes: bool) -> Self {
        Self {
            pool: PagePool::new(pages),
            index: PrefixIndex::default(),
            slots_hold_pages,
            shares_prefixes,
            free_slots: (0..slots).rev().map(SeqSlot).collect(),
            residents: BTreeMap::new(),
            holders: HashMap::new(),
            changes: Vec::new(),
        }
    }

    pub fn total_pages(&self) -> usize {
        self.pool.capacity()
    }

    /// Pages that only the prefix index references.
    pub fn cached_pages(&self) -> usize {
        self.total_pages() - self.free_pages() - self.held_pages()
    }

    /// Pages of running sequences.
    pub fn held_pages(&self) -> usize {
        self.pool.held()
    }

    pub fn free_pages(&self) -> usize {
        self.pool.free()
    }

    /// Removes and returns the changes that the runner must apply before the next step, in order.
    pub fn take_changes(&mut self) -> Vec<SlotChange> {
        std::mem::take(&mut self.changes)
    }

    /// Applies the pending changes to the runner.
    pub fn apply_changes(&mut self, runner: &mut dyn ModelRunner) {
        for change in self.changes.drain(..) {
            match change {
                SlotChange::Fork(from, to, tokens) => runner.fork(from, to, tokens),
                SlotChange::Truncate(slot, tokens) => runner.truncate(slot, tokens),
                SlotChange::Release(slot) => runner.release(slot),
                SlotChange::CopyPage(from, to) => runner.copy_page(from, to),
            }
        }
    }

    /// The prefix match of `tokens` at this moment. The last token is never taken from the cache,
    /// because its logits are needed.
    pub fn prefix_match(&self, key: CacheKey, tokens: &[Token]) -> PrefixMatch {
        if !self.shares_prefixes {
            return PrefixMatch::default();
        }
        let found = self.index.lookup(key, &tokens[..tokens.len().saturating_sub(1)]);
        let held = found.computed.iter().filter(|&&node| self.index.page(node).is_held());
        PrefixMatch {
            cached: found.computed.len() * PAGE_TOKENS,
            held: held.count() * PAGE_TOKENS,
            pending: found.pending * PAGE_TOKENS,
        }
    }

    /// Allocates pages for all of `tokens`, sharing cached pages. Returns `None` if there is no
    /// slot, or not enough pages even after evicting everything cached; then only cached pages may
    /// have changed. `reuse` is false if the logits of all rows are needed.
    pub fn admit(&mut self, key: CacheKey, tokens: &[Token], reuse: bool) -> Option<Admission> {
        let reusable =
            if reuse && self.shares_prefixes { tokens.len().saturating_sub(1) } else { 0 };
        let found = self.index.lookup(key, &tokens[..reusable]);
        let path = found.computed;
        self.index.touch(&path);
        // Hold the shared pages from here on, so that making room does not evict them.
        let mut pages: Vec<_> =
            path.iter().map(|&node| Hold::new(self.index.page(node).clone())).collect();
        let wanted = tokens.len().div_ceil(PAGE_TOKENS).max(1) - pages.len();
        if !self.make_room(wanted) {
            return None;
        }
        // Making room may have evicted the partially matching page.
        let tail = found.tail.filter(|&(node, _)| self.index.has(node));
        let whole = path.len() * PAGE_TOKENS;
        let rest = &tokens[whole..reusable.max(whole)];
        let (slot, mut cached) = self.take_slot(key, &path, tail, rest)?;
        for _ in 0..wanted {
            pages.push(self.pool.allocate().expect("room was made"));
        }
        if let Some((node, shared)) = tail.filter(|_| !self.slots_hold_pages) {
            let (from, to) = (self.index.page(node).id(), pages[path.len()].page().id());
            self.changes.push(SlotChange::CopyPage(from, to));
            cached = whole + shared;
        }
        let computed = path.len();
        let mut admitted =
            SequencePages { slot, key, pages, path, computed, diverged: !self.shares_prefixes };
        self.register(&mut admitted, tokens);
        Some(Admission { pages: admitted, cached })
    }

    /// Creates a sequence that shares the first `tokens` tokens of `from`; a partially filled last
    /// page is copied. Returns `None` under the conditions of [`KvCacheManager::admit`].
    pub fn fork(&mut self, from: &SequencePages, tokens: usize) -> Option<SequencePages> {
        let shared = from.path.len().min(tokens / PAGE_TOKENS).min(from.computed);
        let wanted = tokens.div_ceil(PAGE_TOKENS).max(1) - shared;
        if !self.make_room(wanted) {
            return None;
        }
        let (slot, _) = self.take_slot(from.key, &[], None, &[])?;
        let mut pages = from.pages[..shared].to_vec();
        for _ in 0..wanted {
            pages.push(self.pool.allocate().expect("room was made"));
        }
        let path = from.path[..shared].to_vec();
        self.fill_slot(slot, from.slot, &path, tokens);
        if !self.slots_hold_pages {
            let copied = from.pages.iter().zip(&pages).take(tokens.div_ceil(PAGE_TOKENS));
            self.changes.extend(
                copied
                    .skip(shared)
                    .map(|(from, to)| SlotChange::CopyPage(from.page().id(), to.page().id())),
            );
        }
        // Private full pages in between would leave a gap in the path.
        let diverged = from.diverged || shared < tokens / PAGE_TOKENS;
        Some(SequencePages { slot, key: from.key, pages, path, computed: shared, diverged })
    }

    /// Allocates pages until `tokens` tokens fit. Returns false if there are not enough pages.
    pub fn grow(&mut self, of: &mut SequencePages, tokens: usize) -> bool {
        let wanted = tokens.div_ceil(PAGE_TOKENS).saturating_sub(of.pages.len());
        if !self.make_room(wanted) {
            return false;
        }
        for _ in 0..wanted {
            of.pages.push(self.pool.allocate().expect("room was made"));
        }
        true
    }

    /// Records that `tokens` have been computed: other sequences may share their full pages.
    pub fn commit(&mut self, of: &mut SequencePages, tokens: &[Token]) {
        self.register(of, tokens);
        let full = (tokens.len() / PAGE_TOKENS).min(of.path.len());
        for &node in &of.path[of.computed.min(full)..full] {
            self.index.set_computed(node);
            self.holders.entry(node).or_default().push(of.slot);
        }
        of.computed = of.computed.max(full);
    }

    /// Discards all but the first `computed` tokens in the runner, and frees the pages that these
    /// tokens do not need. Used after rejected drafts.
    pub fn roll_back(&mut self, of: &mut SequencePages, computed: usize) {
        let needed = computed.div_ceil(PAGE_TOKENS).max(1);
        debug_assert!(of.path.len() <= needed, "what others may share accepts");
        of.pages.truncate(needed);
        if self.slots_hold_pages {
            self.changes.push(SlotChange::Truncate(of.slot, computed));
        }
    }

    /// Frees a finished sequence. Its computed pages stay cached; the others become free.
    pub fn free_sequence(&mut self, mut of: SequencePages) {
        self.index.touch(&of.path);
        for &node in of.path[of.computed..].iter().rev() {
            self.index.remove(node);
        }
        of.path.truncate(of.computed);
        let slot = of.slot;
        match of.path.last() {
            // A slot is kept only for pages that no other slot holds.
            Some(&deepest) if self.slots_hold_pages && !self.other_holder(deepest, slot) => {
                self.residents.insert(slot, deepest);
                self.changes.push(SlotChange::Truncate(slot, self.index.end_token(deepest)));
            }
            _ => {
                self.forget_holder(slot, &of.path);
                self.release_slot(slot);
            }
        }
    }

    /// Inserts full pages of `tokens` that have no node yet into the prefix index.
    fn register(&mut self, of: &mut SequencePages, tokens: &[Token]) {
        while !of.diverged && (of.path.len() + 1) * PAGE_TOKENS <= tokens.len() {
            let at = of.path.len();
            let parent = match of.path.last() {
                Some(&node) => node,
                None => self.index.root(of.key),
            };
            let page = &tokens[at * PAGE_TOKENS..(at + 1) * PAGE_TOKENS];
            match self.index.insert(parent, page, of.pages[at].page().clone()) {
                Some(node) => of.path.push(node),
                None => of.diverged = true,
            }
        }
    }

    /// Evicts cached pages until `wanted` pages are free. Returns false if that is impossible.
    fn make_room(&mut self, wanted: usize) -> bool {
        while self.pool.free() < wanted {
            let Some(node) = self.index.eviction_candidate() else { return false };
            self.evict(node);
        }
        true
    }

    /// Evicts the least recently used cached page. Returns false if no page can be evicted.
    pub fn evict_one(&mut self) -> bool {
        let candidate = self.index.eviction_candidate();
        candidate.inspect(|&node| self.evict(node)).is_some()
    }

    fn evict(&mut self, node: NodeId) {
        let keep = self.index.end_token(node) - PAGE_TOKENS;
        let parent = self.parent_of(node);
        self.index.remove(node);
        for slot in self.holders.remove(&node).unwrap_or_default() {
            // Only residents can hold a page that no running sequence holds.
            match parent {
                Some(parent) if !self.other_holder(parent, slot) => {
                    self.residents.insert(slot, parent);
                    self.changes.push(SlotChange::Truncate(slot, keep));
                }
                _ => self.release_resident(slot, parent),
            }
        }
    }

    fn other_holder(&self, node: NodeId, slot: SeqSlot) -> bool {
        self.holders.get(&node).is_some_and(|holders| holders.iter().any(|&h| h != slot))
    }

    /// The node of the page before; `None` for a first page.
    fn parent_of(&self, node: NodeId) -> Option<NodeId> {
        self.index.parent(node)
    }

    /// Allocates a slot that holds the pages of `path` and the cached part of `rest`, the tokens
    /// after them. Returns the slot and the number of tokens that it holds. `tail` is the page with
    /// the longest common prefix with `rest`.
    fn take_slot(
        &mut self,
        key: CacheKey,
        path: &[NodeId],
        tail: Option<(NodeId, usize)>,
        rest: &[Token],
    ) -> Option<(SeqSlot, usize)> {
        let whole = path.len() * PAGE_TOKENS;
        loop {
            let holder = path.last().and_then(|&deepest| self.holder(deepest));
            if let Some(slot) = holder
                && self.residents.get(&slot) == path.last()
            {
                self.residents.remove(&slot);
                return Some((slot, whole));
            }
            let tail = tail.filter(|&(node, _)| self.slots_hold_pages && self.index.has(node));
            if let Some(slot) = self.free_slots.pop() {
                let (donor, tokens) = match tail {
                    Some((node, shared)) => (self.holder(node), whole + shared),
                    None => (holder, whole),
                };
                if let Some(donor) = donor {
                    self.fill_slot(slot, donor, path, tokens);
                }
                return Some((slot, tokens));
            }
            // Slots are exhausted before pages: take the slot of the least recently used resident.
            let most = tail.map_or(0, |(_, shared)| shared);
            if let Some((slot, shared)) = self.take_over(key, path, most, rest) {
                return Some((slot, whole + shared));
            }
            if self.residents.is_empty() || !self.evict_one() {
                return None;
            }
        }
    }

    /// Truncates the least recently used resident to the part that it shares with a prompt: `path`
    /// and at least `most` tokens of `rest`. Nothing has to be copied then.
    fn take_over(
        &mut self,
        key: CacheKey,
        path: &[NodeId],
        most: usize,
        rest: &[Token],
    ) -> Option<(SeqSlot, usize)> {
        let slot = self.holder(self.index.eviction_candidate()?)?;
        let mut beyond = self.path_to(*self.residents.get(&slot)?);
        if beyond.len() < path.len() || beyond.drain(..path.len()).ne(path.iter().copied()) {
            return None;
        }
        let next = beyond.first().filter(|&&next| self.index.key(next) == key);
        let shared = next.map_or(0, |&next| self.index.shared_tokens(next, rest));
        if shared < most {
            return None;
        }
        self.residents.remove(&slot);
        for &node in beyond.iter().rev() {
            if self.other_holder(node, slot) {
                self.forget_holder(slot, &[node]);
            } else {
                self.holders.remove(&node);
                self.index.remove(node);
            }
        }
        self.changes.push(SlotChange::Truncate(slot, path.len() * PAGE_TOKENS + shared));
        Some((slot, shared))
    }

    /// The nodes from the first page to `deepest`.
    fn path_to(&self, deepest: NodeId) -> Vec<NodeId> {
        let mut path: Vec<_> =
            std::iter::successors(Some(deepest), |&node| self.parent_of(node)).collect();
        path.reverse();
        path
    }

    fn holder(&self, node: NodeId) -> Option<SeqSlot> {
        self.holders.get(&node)?.first().copied()
    }

    /// Copies the first `tokens` tokens of another slot, including the pages of `path`, into an
    /// empty slot.
    fn fill_slot(&mut self, slot: SeqSlot, from: SeqSlot, path: &[NodeId], tokens: usize) {
        if self.slots_hold_pages {
            self.changes.push(SlotChange::Fork(from, slot, tokens));
        }
        for &node in path {
            self.holders.entry(node).or_default().push(slot);
        }
    }

    fn release_resident(&mut self, slot: SeqSlot, deepest: Option<NodeId>) {
        self.residents.remove(&slot);
        let path = deepest.map_or_else(Vec::new, |node| self.path_to(node));
        self.forget_holder(slot, &path);
        self.release_slot(slot);
    }

    fn forget_holder(&mut self, slot: SeqSlot, path: &[NodeId]) {
        for node in path {
            if let Some(holders) = self.holders.get_mut(node) {
                holders.retain(|&holder| holder != slot);
            }
        }
    }

    fn release_slot(&mut self, slot: SeqSlot) {
        self.changes.push(SlotChange::Release(slot));
        let at = self.free_slots.partition_point(|&free| free > slot);
        self.free_slots.insert(at, slot);
    }
}
