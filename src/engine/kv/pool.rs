//! The page pool: reference-counted pages that return to the pool through `Drop`.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// A page of the cache. It becomes free when its last `Rc` is dropped.
#[derive(Debug)]
pub struct Page {
    id: u32,
    /// Number of [`Hold`]s on the page.
    holds: Cell<u32>,
    ledger: Rc<Ledger>,
}

#[derive(Debug)]
struct Ledger {
    free: RefCell<Vec<u32>>,
    /// Number of pages with a [`Hold`] on them.
    held: Cell<usize>,
}

impl Page {
    /// Index of the page in the runner's cache, below the pool's capacity.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Whether a running sequence uses the page.
    pub fn is_held(&self) -> bool {
        self.holds.get() > 0
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.ledger.free.borrow_mut().push(self.id);
    }
}

/// A running sequence's reference to a page; the prefix index references the page without a `Hold`.
/// Held pages are counted on creation and drop of a `Hold`, so the count takes constant time at any
/// cache size.
#[derive(Debug)]
pub struct Hold(Rc<Page>);

impl Hold {
    pub fn new(page: Rc<Page>) -> Self {
        if page.holds.replace(page.holds.get() + 1) == 0 {
            page.ledger.held.update(|held| held + 1);
        }
        Self(page)
    }

    pub fn page(&self) -> &Rc<Page> {
        &self.0
    }
}

impl Clone for Hold {
    fn clone(&self) -> Self {
        Self::new(self.0.clone())
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if self.0.holds.replace(self.0.holds.get() - 1) == 1 {
            self.0.ledger.held.update(|held| held - 1);
        }
    }
}

/// Allocates pages; a page is allocated at most once at a time.
#[derive(Debug)]
pub struct PagePool {
    capacity: usize,
    ledger: Rc<Ledger>,
}

impl PagePool {
    pub fn new(capacity: u32) -> Self {
        let free = RefCell::new((0..capacity).rev().collect());
        Self { capacity: capacity as usize, ledger: Rc::new(Ledger { free, held: Cell::new(0) }) }
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    pub fn free(&self) -> usize {
        self.ledger.free.borrow().len()
    }

    pub fn held(&self) -> usize {
        self.ledger.held.get()
    }

    /// Allocates a page. Returns `None` if every page is in use.
    pub fn allocate(&self) -> Option<Hold> {
        let id = self.ledger.free.borrow_mut().pop()?;
        Some(Hold::new(Rc::new(Page { id, holds: Cell::new(0), ledger: self.ledger.clone() })))
    }
}
