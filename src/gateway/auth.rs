//! Authentication by API key. Keys are compared as SHA-256 digests in constant time. A request
//! without a key is denied unless [`crate::gateway::server`] lists its route as open.

use crate::config::{KeyConfig, ShareScope};
use crate::gateway::error::ApiError;
use crate::gateway::limits::{KeyLimits, Permit};
use crate::gateway::store::hex;
use http::{HeaderMap, header};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

/// Key number of every client when no API keys are set.
const ANYONE: u64 = 0;
/// Key number of the admin key.
const ADMIN: u64 = 1;
const FIRST_KEY: u64 = 2;
/// Length limit of the `Authorization` header, in bytes; a longer header is not hashed.
const MAX_KEY: usize = 4096;

/// Identity of the client that sent a request, stored in the request's extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Key number. Requests with the same key share a fair queue and its limits.
    pub key: u64,
    /// Prefix pages are shared only within one tenant.
    pub tenant: u64,
    /// Whether the request carried the admin key.
    pub admin: bool,
}

/// Digests of the configured keys.
#[derive(Debug)]
pub struct Auth {
    keys: Vec<[u8; 32]>,
    admin: Option<[u8; 32]>,
    share_all: bool,
    limits: Arc<KeyLimits>,
}

impl Auth {
    /// Reads the keys and limits from the configuration.
    pub fn new(config: &KeyConfig) -> Self {
        Self {
            keys: config.api_keys.iter().map(|key| key.digest()).collect(),
            admin: config.admin_key.as_ref().map(|key| key.digest()),
            share_all: config.share_prefixes == ShareScope::All,
            limits: KeyLimits::new(config),
        }
    }

    /// Identifies the client of a request to the API.
    ///
    /// # Errors
    /// 401 if keys are set and the request carries none of them.
    pub fn identify(&self, headers: &HeaderMap) -> Result<Identity, ApiError> {
        let sent = sent_key(headers);
        match sent.and_then(|sent| self.find(sent)) {
            Some(key) => Ok(self.identity(key)),
            // Official clients always send some key, so an unknown key is accepted here.
            None if self.keys.is_empty() => Ok(self.identity(ANYONE)),
            None if sent.is_none() => Err(ApiError::unauthorized(
                "This server needs an API key: send it as `Authorization: Bearer KEY` or `X-Api-Key: \
                 KEY`.",
            )),
            None => Err(ApiError::unauthorized("The API key is not valid.")),
        }
    }

    /// Identifies the client of a request to an admin route.
    ///
    /// # Errors
    /// 404 if no admin key is set, so that the routes are not disclosed; 401 if the key is wrong.
    pub fn identify_admin(&self, headers: &HeaderMap) -> Result<Identity, ApiError> {
        if self.admin.is_none() {
            return Err(ApiError::not_found("There is no such route."));
        }
        match sent_key(headers).and_then(|sent| self.find(sent)) {
            Some(ADMIN) => Ok(self.identity(ADMIN)),
            _ => Err(ApiError::unauthorized(
                "Admin routes need the admin key: send it as `Authorization: Bearer KEY`.",
            )),
        }
    }

    /// Counts a request against the limits of its key until the permit is dropped.
    ///
    /// # Errors
    /// 429 if the key has reached a limit.
    pub fn admit(&self, identity: Identity) -> Result<Permit, ApiError> {
        self.limits.admit(identity.key)
    }

    /// Owner name of files and jobs. It survives a restart and a reordering of the keys.
    pub fn owner(&self, identity: Identity) -> String {
        let at = identity.key.checked_sub(FIRST_KEY).and_then(|at| usize::try_from(at).ok());
        match at.and_then(|at| self.keys.get(at)) {
            Some(digest) => hex(&digest[..8]),
            None if identity.admin => "admin".to_owned(),
            None => String::new(),
        }
    }

    /// Compares `sent` with every key, even after a match, so that the time is the same for all
    /// keys.
    fn find(&self, sent: &str) -> Option<u64> {
        let sent: [u8; 32] = Sha256::digest(sent.as_bytes()).into();
        let mut found = ANYONE;
        for (number, key) in (FIRST_KEY..).zip(&self.keys) {
            found.conditional_assign(&number, sent.ct_eq(key));
        }
        let is_admin = self.admin.map_or(Choice::from(0), |admin| sent.ct_eq(&admin));
        found.conditional_assign(&ADMIN, is_admin);
        (found != ANYONE).then_some(found)
    }

    fn identity(&self, key: u64) -> Identity {
        Identity { key, tenant: if self.share_all { ANYONE } else { key }, admin: key == ADMIN }
    }
}

/// The key in `Authorization: Bearer KEY`, or in `X-Api-Key: KEY`, which Anthropic's clients send.
fn sent_key(headers: &HeaderMap) -> Option<&str> {
    let key = match headers.get(header::AUTHORIZATION) {
        Some(value) => {
            let (scheme, key) = value.to_str().ok()?.trim().split_once(' ')?;
            if !scheme.eq_ignore_ascii_case("bearer") {
                return None;
            }
            key.trim()
        }
        None => headers.get("x-api-key")?.to_str().ok()?.trim(),
    };
    (!key.is_empty() && key.len() <= MAX_KEY).then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auth(keys: &[&str], admin: Option<&str>, share: ShareScope) -> Auth {
        Auth::new(&KeyConfig {
            api_keys: keys.iter().map(|key| key.parse().unwrap()).collect(),
            admin_key: admin.map(|key| key.parse().unwrap()),
            rate_limit: None,
            max_concurrent_per_key: None,
            share_prefixes: share,
        })
    }

    fn sent(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())])
    }

    #[test]
    fn without_keys_everyone_is_one() {
        let auth = auth(&[], None, ShareScope::Key);
        let anyone = Identity { key: ANYONE, tenant: ANYONE, admin: false };
        assert_eq!(auth.identify(&HeaderMap::new()).unwrap(), anyone);
        assert_eq!(auth.identify(&sent("Bearer none")).unwrap(), anyone);
        assert_eq!(auth.identify_admin(&sent("Bearer none")).unwrap_err().status, 404);
    }

    #[test]
    fn keys_are_their_own_tenants_unless_shared() {
        let own = auth(&["a", "b"], Some("root"), ShareScope::Key);
        let tenant = |auth: &Auth, key: &str| auth.identify(&sent(key)).unwrap().tenant;
        assert_ne!(tenant(&own, "Bearer a"), tenant(&own, "bearer  b"));
        let all = auth(&["a", "b"], Some("root"), ShareScope::All);
        assert_eq!(tenant(&all, "Bearer a"), tenant(&all, "Bearer b"));
        assert_ne!(all.identify(&sent("Bearer a")).unwrap().key, 0);
    }

    #[test]
    fn wrong_and_missing_keys_are_refused() {
        let auth = auth(&["a"], Some("root"), ShareScope::Key);
        for header in ["Bearer x", "Bearer ", "Basic a", "a", "Bearer aa"] {
            assert_eq!(auth.identify(&sent(header)).unwrap_err().status, 401, "{header}");
        }
        assert_eq!(auth.identify(&HeaderMap::new()).unwrap_err().status, 401);
        assert_eq!(auth.identify_admin(&sent("Bearer a")).unwrap_err().status, 401);
        assert!(auth.identify_admin(&sent("Bearer root")).unwrap().admin);
        assert!(auth.identify(&sent("Bearer root")).unwrap().admin);
    }

    #[test]
    fn x_api_key_is_as_good_as_a_bearer_token() {
        let auth = auth(&["a"], Some("root"), ShareScope::Key);
        let header = |value: &str| {
            HeaderMap::from_iter([("x-api-key".parse().unwrap(), value.parse().unwrap())])
        };
        let by_bearer = auth.identify(&sent("Bearer a")).unwrap();
        assert_eq!(auth.identify(&header("a")).unwrap(), by_bearer);
        assert!(auth.identify_admin(&header("root")).unwrap().admin);
        for wrong in ["", "b", "Bearer a"] {
            assert_eq!(auth.identify(&header(wrong)).unwrap_err().status, 401, "{wrong}");
        }
        // If both are sent, the bearer token counts, so that a second key cannot be tried beside
        // it.
        let mut both = sent("Bearer b");
        both.insert("x-api-key", "a".parse().unwrap());
        assert_eq!(auth.identify(&both).unwrap_err().status, 401);
    }
}
