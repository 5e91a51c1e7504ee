//! The prefix index: a radix tree at page granularity.
//!
//! A node represents one full page of tokens that follows its parent's page; its key is the tokens
//! themselves, so there are no hash collisions. A root represents a pair of adapter digest and
//! tenant: pages are never shared across adapters or tenants. A node is inserted when its page is
//! allocated, before the contents are computed, so that simultaneous requests find each other's
//! prefixes.
//!
//! References: the index has one reference to every node's page; each running sequence has a
//! [`Hold`](super::pool::Hold) on every page in its table. A page that only the index references is
//! *cached*. Cached pages are evicted least recently used first, leaves before their parents.

use super::pool::Page;
use crate::engine::runner::PAGE_TOKENS;
use crate::ipc::Token;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

pub type NodeId = u32;

/// Pages examined on either side of a position to find a computed one.
const NEIGHBOURS: usize = 8;
type PageKey = [Token; PAGE_TOKENS];

/// The scope in which pages may be shared: the adapter's contents and the tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CacheKey {
    /// Digest of the adapter's file; zero for the base model.
    pub adapter: [u8; 32],
    pub tenant: u64,
}

#[derive(Debug)]
struct Node {
    parent: Option<NodeId>,
    /// `None` for a root.
    page: Option<(Box<PageKey>, Rc<Page>)>,
    /// Number of pages from the root to this node, inclusive.
    depth: u32,
    children: u32,
    last_used: u64,
    /// The page's contents are in the cache.
    computed: bool,
    root: Option<CacheKey>,
}

#[derive(Debug, Default)]
pub struct PrefixIndex {
    nodes: Vec<Option<Node>>,
    vacant: Vec<NodeId>,
    roots: HashMap<CacheKey, NodeId>,
    /// Ordered, so that the page with the longest common prefix with some tokens is a neighbour of
    /// the position of these tokens.
    edges: BTreeMap<(NodeId, Box<PageKey>), NodeId>,
    /// Nodes without children, least recently used first: the candidates for eviction.
    leaves: BTreeSet<(u64, NodeId)>,
    clock: u64,
    pages: usize,
}

/// The longest known prefix of a token sequence.
#[derive(Debug, Default)]
pub struct Match {
    /// Nodes whose contents are computed, from the first page on.
    pub computed: Vec<NodeId>,
    /// Further pages that match but are still being computed by a running sequence.
    pub pending: usize,
    /// A further computed page that matches partially, with its number of matching tokens.
    pub tail: Option<(NodeId, usize)>,
}

impl PrefixIndex {
    /// Pages in the index, computed or pending.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Looks up full pages of `tokens`. Does not count as a use.
    pub fn lookup(&self, key: CacheKey, tokens: &[Token]) -> Match {
        let mut found = Match::default();
        let Some(&root) = self.roots.get(&key) else { return found };
        let mut at = root;
        for page in tokens.chunks_exact(PAGE_TOKENS) {
            let Some(&next) = self.edges.get(&(at, page_key(page))) else { break };
            // All descendants of a pending page are pending.
            if self.node(next).computed {
                found.computed.push(next);
            } else {
                found.pending += 1;
            }
            at = next;
        }
        let end = found.computed.last().copied().unwrap_or(root);
        found.tail = self.nearest_page(end, &tokens[found.computed.len() * PAGE_TOKENS..]);
        found
    }

    /// The computed page after `parent` with the longest common prefix with `tokens`.
    fn nearest_page(&self, parent: NodeId, tokens: &[Token]) -> Option<(NodeId, usize)> {
        let mut key = Box::new([0; PAGE_TOKENS]);
        let known = tokens.len().min(PAGE_TOKENS);
        key[..known].copy_from_slice(&tokens[..known]);
        let place = (parent, key);
        let near = |(&(from, _), &node): (&(NodeId, Box<PageKey>), &NodeId)| {
            (from == parent && self.node(node).computed)
                .then(|| (node, self.shared_tokens(node, tokens)))
        };
        let below = self.edges.range(..&place).rev().take(NEIGHBOURS).filter_map(near).next();
        let above = self.edges.range(&place..).take(NEIGHBOURS).filter_map(near).next();
        let best = below.into_iter().chain(above).max_by_key(|&(_, shared)| shared);
        best.filter(|&(_, shared)| shared > 0)
    }

    /// Length of the common prefix of the node's page and `tokens`, in tokens.
    pub fn shared_tokens(&self, node: NodeId, tokens: &[Token]) -> usize {
        let (page, _) = self.node(node).page.as_ref().expect("roots are never in a match");
        page.iter().zip(tokens).take_while(|(a, b)| a == b).count()
    }

    #[cfg(test)]
    pub fn computed_nodes(&self) -> impl Iterator<Item = NodeId> {
        let live =
            self.nodes.iter().enumerate().filter_map(|(id, node)| Some((id, node.as_ref()?)));
        live.filter(|(_, node)| node.computed && node.page.is_some()).map(|(id, _)| id as NodeId)
    }

    /// Whether the node still exists. Valid only if no node has been inserted since the lookup: ids
    /// are reused.
    pub fn has(&self, node: NodeId) -> bool {
        self.nodes[node as usize].is_some()
    }

    /// The root node of `key`; created if it does not exist.
    pub fn root(&mut self, key: CacheKey) -> NodeId {
        if let Some(&root) = self.roots.get(&key) {
            return root;
        }
        let id = self.enter(Node {
            parent: None,
            page: None,
            depth: 0,
            children: 0,
            last_used: self.clock,
            computed: true,
            root: Some(key),
        });
        self.roots.insert(key, id);
        id
    }

    /// Inserts `page`, which will hold `tokens` after `parent`, as not yet computed. Returns `None`
    /// if a node for the same tokens exists: the caller's page then stays private.
    pub fn insert(&mut self, parent: NodeId, tokens: &[Token], page: Rc<Page>) -> Option<NodeId> {
        let key = page_key(tokens);
        if self.edges.contains_key(&(parent, key.clone())) {
            return None;
        }
        let depth = self.node(parent).depth + 1;
        let id = self.enter(Node {
            parent: Some(parent),
            page: Some((key.clone(), page)),
            depth,
            children: 0,
            last_used: self.clock,
            computed: false,
            root: None,
        });
        self.pages += 1;
        self.edges.insert((parent, key), id);
        let parent_node = self.node_mut(parent);
        parent_node.children += 1;
        let was = (parent_node.last_used, parent);
        self.leaves.remove(&was);
        self.leaves.insert((self.clock, id));
        Some(id)
    }

    pub fn set_computed(&mut self, node: NodeId) {
        self.node_mut(node).computed = true;
    }

    pub fn page(&self, node: NodeId) -> &Rc<Page> {
        let (_, page) = self.node(node).page.as_ref().expect("roots are never in a match");
        page
    }

    /// Number of tokens from the start of the sequence to the end of this node's page.
    pub fn end_token(&self, node: NodeId) -> usize {
        self.node(node).depth as usize * PAGE_TOKENS
    }

    /// The node of the page before; `None` for a first page.
    pub fn parent(&self, node: NodeId) -> Option<NodeId> {
        self.node(node).parent.filter(|&parent| self.node(parent).page.is_some())
    }

    /// The key of the node's root.
    pub fn key(&self, node: NodeId) -> CacheKey {
        let mut at = self.node(node);
        while let Some(parent) = at.parent {
            at = self.node(parent);
        }
        at.root.expect("a node without a parent is a root")
    }

    /// The least recently used leaf that no running sequence holds.
    pub fn eviction_candidate(&self) -> Option<NodeId> {
        self.leaves.iter().map(|&(_, id)| id).find(|&id| !self.page(id).is_held())
    }

    /// Removes a leaf node.
    pub fn remove(&mut self, id: NodeId) {
        let node = self.nodes[id as usize].take().expect("a node is removed once");
        debug_assert_eq!(node.children, 0, "tails go first");
        self.leaves.remove(&(node.last_used, id));
        self.vacant.push(id);
        if let Some(key) = node.root {
            self.roots.remove(&key);
        }
        let (Some(parent), Some((key, _page))) = (node.parent, node.page) else { return };
        self.pages -= 1;
        self.edges.remove(&(parent, key));
        let above = self.node_mut(parent);
        above.children -= 1;
        if above.children > 0 {
            return;
        }
        let (last_used, is_root) = (above.last_used, above.page.is_none());
        if is_root {
            self.remove(parent);
        } else {
            self.leaves.insert((last_used, parent));
        }
    }

    /// Marks nodes as just used.
    pub fn touch(&mut self, path: &[NodeId]) {
        self.clock += 1;
        let clock = self.clock;
        for &id in path {
            let node = self.node_mut(id);
            let was = (std::mem::replace(&mut node.last_used, clock), id);
            if self.leaves.remove(&was) {
                self.leaves.insert((clock, id));
            }
        }
    }

    fn enter(&mut self, node: Node) -> NodeId {
        if let Some(id) = self.vacant.pop() {
            self.nodes[id as usize] = Some(node);
            return id;
        }
        self.nodes.push(Some(node));
        NodeId::try_from(self.nodes.len() - 1).expect("there are fewer nodes than pages")
    }

    fn node(&self, id: NodeId) -> &Node {
        self.nodes[id as usize].as_ref().expect("node ids in use are live")
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes[id as usize].as_mut().expect("node ids in use are live")
    }
}

fn page_key(tokens: &[Token]) -> Box<PageKey> {
    Box::new(tokens.try_into().expect("callers cut whole pages"))
}
