//! Limits per API key: requests per minute, and concurrent requests.

use crate::config::KeyConfig;
use crate::gateway::error::ApiError;
use axum::body::{Body, Bytes};
use http_body::{Body as HttpBody, Frame, SizeHint};
use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

/// State of the limits of every key. Keys come from the configuration, so the map stays small.
#[derive(Debug)]
pub struct KeyLimits {
    /// Requests per minute.
    rate: Option<f64>,
    concurrent: Option<u32>,
    keys: Mutex<HashMap<u64, Usage>>,
}

#[derive(Debug)]
struct Usage {
    /// Token bucket: one token is one request; it holds at most the requests of one minute.
    tokens: f64,
    filled: Instant,
    running: u32,
}

impl KeyLimits {
    /// Reads the limits from the configuration; by default there are none.
    pub fn new(config: &KeyConfig) -> Arc<Self> {
        Arc::new(Self {
            rate: config.rate_limit.map(|rate| f64::from(rate.get())),
            concurrent: config.max_concurrent_per_key.map(|count| count.get()),
            keys: Mutex::default(),
        })
    }

    /// Counts a request of `key`.
    ///
    /// # Errors
    /// 429 with `Retry-After` if a limit is reached; the request is then not counted.
    pub fn admit(self: &Arc<Self>, key: u64) -> Result<Permit, ApiError> {
        self.admit_at(key, Instant::now())
    }

    fn admit_at(self: &Arc<Self>, key: u64, now: Instant) -> Result<Permit, ApiError> {
        let mut keys = self.lock();
        let full = self.rate.unwrap_or_default();
        let usage = keys.entry(key).or_insert(Usage { tokens: full, filled: now, running: 0 });
        if let Some(limit) = self.concurrent
            && usage.running >= limit
        {
            return Err(ApiError::too_many(
                format!("This key already has {limit} requests running, its limit."),
                1,
                "concurrency_limit_exceeded",
            ));
        }
        if let Some(rate) = self.rate {
            let passed = now.saturating_duration_since(usage.filled).as_secs_f64();
            usage.tokens = (usage.tokens + passed * rate / 60.0).min(rate);
            usage.filled = now;
            if usage.tokens < 1.0 {
                let wait = ((1.0 - usage.tokens) * 60.0 / rate).ceil().clamp(1.0, 60.0);
                return Err(ApiError::too_many(
                    format!("This key may send {rate} requests per minute."),
                    wait as u32,
                    "rate_limit_exceeded",
                ));
            }
            usage.tokens -= 1.0;
        }
        usage.running += 1;
        Ok(Permit { limits: self.clone(), key })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Usage>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One running request of a key. Dropping it frees one concurrent request.
#[derive(Debug)]
pub struct Permit {
    limits: Arc<KeyLimits>,
    key: u64,
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(usage) = self.limits.lock().get_mut(&self.key) {
            usage.running = usage.running.saturating_sub(1);
        }
    }
}

/// A response body that holds `guard` until the body has ended or the client has disconnected.
pub struct GuardedBody<G> {
    inner: Body,
    guard: Option<G>,
}

impl<G: Send + Unpin + 'static> GuardedBody<G> {
    /// Wraps `inner` with `guard`.
    pub fn wrap(inner: Body, guard: G) -> Body {
        Body::new(Self { inner, guard: Some(guard) })
    }
}

impl<G: Unpin> HttpBody for GuardedBody<G> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        if let Poll::Ready(None | Some(Err(_))) = polled {
            self.guard = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn limits(rate: Option<f64>, concurrent: Option<u32>) -> Arc<KeyLimits> {
        Arc::new(KeyLimits { rate, concurrent, keys: Mutex::default() })
    }

    #[test]
    fn without_limits_everything_passes() {
        let limits = limits(None, None);
        let permits: Vec<_> = (0..1000).map(|_| limits.admit(0).unwrap()).collect();
        assert_eq!(permits.len(), 1000);
    }

    #[test]
    fn a_bucket_empties_and_fills_again() {
        let limits = limits(Some(60.0), None);
        let start = Instant::now();
        for _ in 0..60 {
            limits.admit_at(1, start).unwrap();
        }
        let error = limits.admit_at(1, start).unwrap_err();
        assert_eq!((error.status.as_u16(), error.retry_after), (429, Some(1)));
        // Another key has its own bucket, and one second refills one request.
        limits.admit_at(2, start).unwrap();
        limits.admit_at(1, start + Duration::from_secs(1)).unwrap();
        assert!(limits.admit_at(1, start + Duration::from_secs(1)).is_err());
    }

    #[test]
    fn permits_return_when_the_body_ends_or_is_dropped() {
        let limits = limits(None, Some(1));
        let body = GuardedBody::wrap(Body::from("hello"), limits.admit(1).unwrap());
        assert_eq!(
            limits.admit(1).unwrap_err().code.as_deref(),
            Some("concurrency_limit_exceeded")
        );
        drop(body);
        drop(limits.admit(1).unwrap());
        assert!(limits.admit(1).is_ok());
    }
}
