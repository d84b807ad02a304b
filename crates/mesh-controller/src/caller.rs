// SPDX-License-Identifier: Apache-2.0
//! Authentication of callers: the API server reviews the token of each request.
//!
//! A caller must present a token of the agents' service account, for this CA's audience and bound to
//! a pod. Such a token proves the node of the caller.

use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::time::timeout;

use super::outcome::Outcome;
use mesh_log::warn_limited;

/// The key of the node's name in the user information of a token (KEP-4193).
const NODE: &str = "authentication.kubernetes.io/node-name";
/// The time that the API server may take.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum length of a token. Tokens of Kubernetes have one to two KiB.
const MAX_TOKEN_BYTES: usize = 16 << 10;

/// A service account.
#[derive(Clone, Copy, Debug)]
pub(super) struct ServiceAccount<'a> {
    pub(super) namespace: &'a str,
    pub(super) name: &'a str,
}

/// Authenticates agents by TokenReview.
pub(super) struct Authenticator {
    api: Api<TokenReview>,
    audience: String,
    /// User name of the agents' service account.
    agent_user: String,
}

impl Authenticator {
    pub(super) fn new(client: Client, agents: ServiceAccount<'_>, audience: &str) -> Self {
        let ServiceAccount { namespace, name } = agents;
        Self {
            api: Api::all(client),
            audience: audience.to_owned(),
            agent_user: format!("system:serviceaccount:{namespace}:{name}"),
        }
    }

    /// Returns the node of the agent that the token belongs to.
    pub(super) async fn node(&self, token: &str) -> Result<String, Outcome> {
        if token.is_empty() || token.len() > MAX_TOKEN_BYTES {
            return Err(Outcome::Unauthenticated);
        }
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: Some(token.to_owned()),
                audiences: Some(vec![self.audience.clone()]),
            },
            ..TokenReview::default()
        };
        let params = PostParams::default();
        match timeout(REVIEW_TIMEOUT, self.api.create(&params, &review)).await {
            Ok(Ok(review)) => self.check(review.status.unwrap_or_default()),
            Ok(Err(error)) => {
                warn_limited!("token_review", error, "cannot review a token");
                Err(Outcome::Unavailable)
            }
            Err(_elapsed) => Err(Outcome::Unavailable),
        }
    }

    /// Checks the answer to a review. Returns the name of the node.
    fn check(&self, status: TokenReviewStatus) -> Result<String, Outcome> {
        if status.authenticated != Some(true) {
            let why = status.error.unwrap_or_default();
            return Err(if why.contains("audience") {
                Outcome::WrongAudience
            } else {
                Outcome::Unauthenticated
            });
        }
        // An API server without support for audiences returns none.
        if !status
            .audiences
            .unwrap_or_default()
            .contains(&self.audience)
        {
            return Err(Outcome::WrongAudience);
        }
        let user = status.user.unwrap_or_default();
        if user.username.as_deref() != Some(&*self.agent_user) {
            return Err(Outcome::NotAnAgent);
        }
        let mut nodes = user
            .extra
            .unwrap_or_default()
            .remove(NODE)
            .unwrap_or_default();
        match (nodes.pop(), nodes.pop()) {
            (Some(node), None) if !node.is_empty() => Ok(node),
            _ => Err(Outcome::NotBound),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn token_must_be_an_agents_for_this_audience_and_bound_to_a_node() {
        let config = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
        let client = Client::try_from(config).unwrap();
        let agents = ServiceAccount {
            namespace: "mesh-system",
            name: "mesh-agent",
        };
        let authenticator = Authenticator::new(client, agents, "mesh-ca");
        let good = serde_json::json!({
            "authenticated": true,
            "audiences": ["mesh-ca"],
            "user": {
                "username": "system:serviceaccount:mesh-system:mesh-agent",
                "extra": {NODE: ["n1"]},
            },
        });
        let check = |change: &[(&str, serde_json::Value)]| {
            let mut value = good.clone();
            for (path, to) in change {
                *value.pointer_mut(path).unwrap() = to.clone();
            }
            authenticator.check(serde_json::from_value(value).unwrap())
        };
        assert_eq!(check(&[]), Ok("n1".to_owned()));
        let node = "/user/extra/authentication.kubernetes.io~1node-name";
        for (path, to, why) in [
            ("/authenticated", false.into(), Outcome::Unauthenticated),
            ("/audiences", serde_json::json!([]), Outcome::WrongAudience),
            (
                "/audiences",
                serde_json::json!(["x"]),
                Outcome::WrongAudience,
            ),
            ("/user/username", "admin".into(), Outcome::NotAnAgent),
            ("/user/extra", serde_json::json!({}), Outcome::NotBound),
            (node, serde_json::json!([]), Outcome::NotBound),
            (node, serde_json::json!(["n1", "n2"]), Outcome::NotBound),
            (node, serde_json::json!([""]), Outcome::NotBound),
        ] {
            assert_eq!(check(&[(path, to)]), Err(why), "{path}");
        }
    }
}
