//! The KV cache's bookkeeping: which pages a sequence owns, shares, or leaves behind.
//!
//! `free + cached + held = total` at all times: `free` pages are in the pool, `cached` ones are
//! held by the prefix index alone, `held` ones by at least one running sequence.
//!
//! A runner whose cache is not addressed by pages (llama.cpp) keeps a page's contents under the
//! sequence slots that computed it. For such a runner finished sequences leave their slot behind
//! as a *resident*, and the cache remembers which slots hold which node; [`SlotChange`]s tell the
//! runner what to forget when pages are evicted.
//!
//! A prompt shares with others to the token: the beginning of a page comes from the slot that holds
//! it, or is copied with its page.

mod pool;
mod prefix;
#[cfg(test)]
mod tests;

pub use pool::{Hold, Page, PagePool};
pub use prefix::{CacheKey, NodeId, PrefixIndex};

use crate::engine::runner::{ModelRunner, PAGE_TOKENS, SeqSlot};
use crate::ipc::Token;
use std::collections::{BTreeMap, HashMap};

/// What the runner has to do so that its cache agrees with the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotChange {
    /// The first so many tokens of one slot become those of another, which is empty.
    Fork(SeqSlot, SeqSlot, usize),
    Truncate(SeqSlot, usize),
    Release(SeqSlot),
    /// For a runner with real pages: one page's contents become another's.
    CopyPage(u32, u32),
}

/// The pages of one running sequence.
#[derive(Debug)]
pub struct SequencePages {
    pub slot: SeqSlot,
    key: CacheKey,
    pages: Vec<Hold>,
    /// Nodes of the first pages; further pages are private.
    path: Vec<NodeId>,
    /// Nodes of `path` whose contents are computed.
    computed: usize,
    /// Another sequence entered the same tokens first: later pages stay private.
    diverged: bool,
}

impl SequencePages {
    pub fn page_ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.pages.iter().map(|hold| hold.page().id())
    }

    /// Tokens that fit into the pages at hand.
    pub fn capacity(&self) -> usize {
        self.pages.len() * PAGE_TOKENS
    }
}

/// What a prompt would find, in whole pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Prospect {
    /// Tokens whose pages are computed.
    pub cached: usize,
    /// Those of them whose pages are held by running sequences: to share them takes no room.
    pub held: usize,
    /// Further tokens that a running sequence is computing: worth waiting for.
    pub pending: usize,
}

/// A sequence's place in the cache, with what it takes over from another.
#[derive(Debug)]
pub struct Admission {
    pub pages: SequencePages,
    /// Tokens already computed.
    pub cached: usize,
}

#[derive(Debug)]
pub struct KvCache {
    pool: PagePool,
    index: PrefixIndex,
    /// Whether the runner keeps pages under slots.
    slots_hold_pages: bool,
    shares_prefixes: bool,
    /// Highest first: the lowest is handed out next, so that slots in use lie close together.
    free_slots: Vec<SeqSlot>,
    /// Slots of finished sequences that hold cached pages, with the deepest node each, which no
    /// other slot holds.
    residents: BTreeMap<SeqSlot, NodeId>,
    /// Slots, running or resident, that hold a node's page.
    holders: HashMap<NodeId, Vec<SeqSlot>>,
    changes: Vec<SlotChange>,
}

impl KvCache {
    /// `slots` is the number of sequences the runner can hold, running and resident together.
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

    /// Pages that only the prefix index has.
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

    /// What the runner must do before the next step, in order.
    pub fn take_changes(&mut self) -> Vec<SlotChange> {
        std::mem::take(&mut self.changes)
    }

    /// Has the runner do it.
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

    /// What `tokens` would find now. The last token is never taken from the cache: its logits are
    /// needed.
    pub fn prospect(&self, key: CacheKey, tokens: &[Token]) -> Prospect {
        if !self.shares_prefixes {
            return Prospect::default();
        }
        let found = self.index.lookup(key, &tokens[..tokens.len().saturating_sub(1)]);
        let held = found.computed.iter().filter(|&&node| self.index.page(node).is_held());
        Prospect {
            cached: found.computed.len() * PAGE_TOKENS,
            held: held.count() * PAGE_TOKENS,
            pending: found.pending * PAGE_TOKENS,
        }
    }

    /// Finds or makes pages for all of `tokens`. `None` when there is no slot, or not enough
    /// pages even after giving up everything cached; nothing has changed then but the cache.
    /// `reuse` is false where every row's logits are wanted.
    pub fn admit(&mut self, key: CacheKey, tokens: &[Token], reuse: bool) -> Option<Admission> {
        let reusable =
            if reuse && self.shares_prefixes { tokens.len().saturating_sub(1) } else { 0 };
        let found = self.index.lookup(key, &tokens[..reusable]);
        let path = found.computed;
        self.index.touch(&path);
        // Held from here on: making room must not evict what we are about to share.
        let mut pages: Vec<_> =
            path.iter().map(|&node| Hold::new(self.index.page(node).clone())).collect();
        let wanted = tokens.len().div_ceil(PAGE_TOKENS).max(1) - pages.len();
        if !self.make_room(wanted) {
            return None;
        }
        // Making room may have taken the page that begins alike.
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

    /// A new sequence that shares everything `from` has, `tokens` long; a part-filled last page is
    /// its own. `None` as in [`KvCache::admit`].
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

    /// Makes sure that `tokens` tokens fit.
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

    /// `tokens` have been computed: full pages become known to others.
    pub fn commit(&mut self, of: &mut SequencePages, tokens: &[Token]) {
        self.register(of, tokens);
        let full = (tokens.len() / PAGE_TOKENS).min(of.path.len());
        for &node in &of.path[of.computed.min(full)..full] {
            self.index.set_computed(node);
            self.holders.entry(node).or_default().push(of.slot);
        }
        of.computed = of.computed.max(full);
    }

    /// The runner has computed more than stands: it forgets all but the first `computed` tokens, and
    /// pages that these do not need are free again.
    pub fn roll_back(&mut self, of: &mut SequencePages, computed: usize) {
        let needed = computed.div_ceil(PAGE_TOKENS).max(1);
        debug_assert!(of.path.len() <= needed, "what others may share stands");
        of.pages.truncate(needed);
        if self.slots_hold_pages {
            self.changes.push(SlotChange::Truncate(of.slot, computed));
        }
    }

    /// The sequence is over. Its computed pages stay cached; the rest is free again.
    pub fn retire(&mut self, mut of: SequencePages) {
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

    /// Enters full pages of `tokens` that have no node yet.
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

    /// Gives up cached pages until `wanted` are free.
    fn make_room(&mut self, wanted: usize) -> bool {
        while self.pool.free() < wanted {
            let Some(node) = self.index.eviction_candidate() else { return false };
            self.evict(node);
        }
        true
    }

    /// Gives up the least recently used cached page. False when nothing is cached.
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

    /// The node above, unless that is a root.
    fn parent_of(&self, node: NodeId) -> Option<NodeId> {
        self.index.parent(node)
    }

    /// A slot that holds the pages of `path` and what others have of `rest`, the tokens after
    /// them; with the number of tokens it holds. `tail` is the page that begins most like `rest`.
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
            // Slots run out before pages: the least recently used resident makes room.
            let most = tail.map_or(0, |(_, shared)| shared);
            if let Some((slot, shared)) = self.take_over(key, path, most, rest) {
                return Some((slot, whole + shared));
            }
            if self.residents.is_empty() || !self.evict_one() {
                return None;
            }
        }
    }

    /// Cuts the least recently used resident back to what it shares with a prompt, `path` and at
    /// least `most` tokens of `rest`: nothing has to be copied then.
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

    /// An empty slot takes over the first `tokens` tokens of another, the pages of `path` among
    /// them.
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
