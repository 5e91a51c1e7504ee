//! The page pool: reference-counted pages that come back through `Drop`.

use std::cell::RefCell;
use std::rc::Rc;

/// A page of the cache. Clone the `Rc` to share it; when the last clone is dropped the page is
/// free again.
#[derive(Debug)]
pub struct Page {
    id: u32,
    free: Rc<RefCell<Vec<u32>>>,
}

impl Page {
    /// Index of the page in the runner's cache, below the pool's capacity.
    pub fn id(&self) -> u32 {
        self.id
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.free.borrow_mut().push(self.id);
    }
}

/// Hands out pages, each at most once at a time.
#[derive(Debug)]
pub struct PagePool {
    capacity: usize,
    free: Rc<RefCell<Vec<u32>>>,
}

impl PagePool {
    pub fn new(capacity: u32) -> Self {
        Self {
            capacity: capacity as usize,
            free: Rc::new(RefCell::new((0..capacity).rev().collect())),
        }
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    pub fn free(&self) -> usize {
        self.free.borrow().len()
    }

    /// `None` when every page is in use.
    pub fn allocate(&self) -> Option<Rc<Page>> {
        let id = self.free.borrow_mut().pop()?;
        Some(Rc::new(Page { id, free: self.free.clone() }))
    }
}
