// SPDX-License-Identifier: Apache-2.0
//! Who asks: a token, reviewed by the API server.
//!
//! Only the agents' service account may ask, with a token for this CA's audience that is bound to a
//! pod, and so to a node: the node is what the caller proves.

use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::time::timeout;

use super::numbers::Outcome;
use mesh_log::warn_limited;

/// What the API server calls the node of a token (KEP-4193).
const NODE: &str = "authentication.kubernetes.io/node-name";
/// How long the API server may take.
const REVIEW: Duration = Duration::from_secs(5);
/// Longest token. Those of Kubernetes have one to two KiB.
const TOKEN_MAX: usize = 16 << 10;

pub(super) struct Callers {
    api: Api<TokenReview>,
    audience: String,
    /// The agents, as the API server names users.
    agents: String,
}

impl Callers {
    pub(super) fn new(client: Client, (namespace, account): (&str, &str), audience: &str) -> Self {
        Self {
            api: Api::all(client),
            audience: audience.to_owned(),
            agents: format!("system:serviceaccount:{namespace}:{account}"),
        }
    }

    /// The node of the agent that this is a token of.
    pub(super) async fn node(&self, token: &str) -> Result<String, Outcome> {
        if token.is_empty() || token.len() > TOKEN_MAX {
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
        match timeout(REVIEW, self.api.create(&params, &review)).await {
            Ok(Ok(review)) => self.judge(review.status.unwrap_or_default()),
            Ok(Err(error)) => {
                warn_limited!("token_review", error, "tokens cannot be reviewed");
                Err(Outcome::Unavailable)
            }
            Err(_elapsed) => Err(Outcome::Unavailable),
        }
    }

    fn judge(&self, status: TokenReviewStatus) -> Result<String, Outcome> {
        if status.authenticated != Some(true) {
            let why = status.error.unwrap_or_default();
            return Err(if why.contains("audience") {
                Outcome::WrongAudience
            } else {
                Outcome::Unauthenticated
            });
        }
        // An API server that knows no audiences says none.
        if !status
            .audiences
            .unwrap_or_default()
            .contains(&self.audience)
        {
            return Err(Outcome::WrongAudience);
        }
        let user = status.user.unwrap_or_default();
        if user.username.as_deref() != Some(&*self.agents) {
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
    async fn only_an_agents_token_for_this_ca_that_says_its_node() {
        let config = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
        let client = Client::try_from(config).unwrap();
        let callers = Callers::new(client, ("mesh-system", "mesh-agent"), "mesh-ca");
        let good = serde_json::json!({
            "authenticated": true,
            "audiences": ["mesh-ca"],
            "user": {
                "username": "system:serviceaccount:mesh-system:mesh-agent",
                "extra": {NODE: ["n1"]},
            },
        });
        let judge = |change: &[(&str, serde_json::Value)]| {
            let mut value = good.clone();
            for (path, to) in change {
                *value.pointer_mut(path).unwrap() = to.clone();
            }
            callers.judge(serde_json::from_value(value).unwrap())
        };
        assert_eq!(judge(&[]), Ok("n1".to_owned()));
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
            assert_eq!(judge(&[(path, to)]), Err(why), "{path}");
        }
    }
}
