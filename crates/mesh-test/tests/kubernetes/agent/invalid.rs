// SPDX-License-Identifier: Apache-2.0
//! Objects of the mesh's kinds that are invalid, written past the schema of their kind: nothing
//! opens, the rest goes on, and what is wrong is told by object and field.

use std::sync::Arc;

use anyhow::Context as _;
use mesh_test::{Kube, Pod, eventually};
use serde_json::{Value, json};

use super::DENY;
use super::fixture::{Fixture, SOON, any_schema, does_reach, patch_crd, serve, storm, unharmed};

/// A kind, and what is made invalid in an object of it.
struct Row {
    kind: &'static str,
    crd: &'static str,
    /// Its scope, and a spec about the pods `app: APP` that closes `near`.
    namespaced: bool,
    spec: &'static str,
    /// The valid value, the invalid one that replaces it, and the field.
    good: &'static str,
    bad: &'static str,
    field: &'static str,
    /// The consequence if the object never had a valid version.
    instead: &'static str,
}

/// A MeshAuthentication closes a pod to who has no proof, every other kind to everybody.
const AUTHENTICATION: &str = "MeshAuthentication";

const ROWS: [Row; 4] = [
    Row {
        kind: "MeshPolicy",
        crd: "meshpolicies.mesh.rs",
        namespaced: true,
        spec: "{podSelector: {matchLabels: {app: APP}}, ingress: [{from: [{ipBlocks: [{cidr: 192.0.2.0/24}]}]}]}",
        good: "192.0.2.0/24",
        bad: "nonsense",
        field: "spec.ingress[0].from[0].ipBlocks[0].cidr",
        instead: "the policy isolates the pods that spec.podSelector selects for ingress",
    },
    Row {
        kind: "ClusterMeshPolicy",
        crd: "clustermeshpolicies.mesh.rs",
        namespaced: false,
        spec: "{tier: Admin, priority: 10, namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: default}}, \
               podSelector: {matchLabels: {app: APP}}, action: Deny, ingress: [{ports: [{port: 7000}]}]}",
        good: "7000",
        bad: "70000",
        field: "spec.ingress[0].ports[0].port",
        instead: "the policy denies all ingress of the pods that its subject selects",
    },
    Row {
        kind: "ClusterNetworkPolicy",
        crd: "clusternetworkpolicies.policy.networking.k8s.io",
        namespaced: false,
        spec: "{tier: Admin, priority: 10, subject: {pods: {namespaceSelector: {matchLabels: \
               {kubernetes.io/metadata.name: default}}, podSelector: {matchLabels: {app: APP}}}}, \
               ingress: [{action: Deny, from: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {number: 7000}}}]}]}",
        good: "7000",
        bad: "70000",
        field: "spec.ingress[0].protocols[0].tcp.destinationPort.number",
        instead: "the policy denies all ingress of the pods that its subject selects",
    },
    Row {
        kind: AUTHENTICATION,
        crd: "meshauthentications.mesh.rs",
        namespaced: true,
        spec: "{podSelector: {matchLabels: {app: APP}}, mtls: Strict}",
        good: "Strict",
        bad: "Sometimes",
        field: "spec.mtls",
        instead: "the object is in force with the strictest value in each invalid field",
    },
];

impl Row {
    fn object(&self, name: &str, app: &str) -> String {
        let version = match self.crd.ends_with(".mesh.rs") {
            true => "mesh.rs/v1alpha1",
            false => "policy.networking.k8s.io/v1alpha2",
        };
        let namespace = if self.namespaced {
            ", namespace: default"
        } else {
            ""
        };
        let spec = self.spec.replace("APP", app);
        format!(
            "apiVersion: {version}\nkind: {}\nmetadata: {{name: {name}{namespace}}}\nspec: {spec}\n",
            self.kind
        )
    }

    fn invalid(&self, name: &str, app: &str) -> String {
        let object = self.object(name, app);
        assert!(object.contains(self.good), "{object}");
        object.replace(self.good, self.bad)
    }
}

/// Writes an object that the schema of its kind refuses. It replaces the schema, as an older version of
/// the CRD may have had none.
fn write_past_schema(kube: &Kube, crd: &str, object: &str) {
    assert!(kube.apply_text(object).is_err(), "{object}: the schema");
    let schema = "/spec/versions/0/schema/openAPIV3Schema";
    let patch = json!([{"op": "replace", "path": schema, "value": any_schema()}]);
    patch_crd(kube, crd, &patch);
    let mut last = None;
    eventually("a schema that takes anything", SOON, || {
        let applied = kube.apply_text(object);
        applied.map_err(|error| last = Some(error)).ok()
    })
    .with_context(|| format!("{object}: {last:?}"))
    .expect("written past the schema");
}

/// The pods, and who is kept out by the kind.
struct Scene {
    fixture: Fixture,
    a: Arc<Pod>,
    near: Arc<Pod>,
    b: Arc<Pod>,
    plain: Arc<Pod>,
}

impl Scene {
    fn kept_out(&self, row: &Row) -> &Pod {
        if row.kind == AUTHENTICATION {
            &self.plain
        } else {
            &self.a
        }
    }

    /// Checks that traffic outside the row's object is not affected.
    fn rest_goes_on(&self, row: &Row) {
        for from in [&self.near, &self.b, &self.plain] {
            let reached = does_reach(from, &self.a);
            assert!(
                reached,
                "{}: {}\n{}",
                row.kind,
                from.name(),
                self.fixture.logs()
            );
        }
    }

    fn delete(&self, row: &Row, name: &str) {
        let delete = ["delete", row.crd, name, "--ignore-not-found"];
        let kube = &self.fixture.kube;
        kube.kubectl(delete).expect("delete");
    }

    fn check(&self, row: &Row) {
        let Self {
            fixture, near, b, ..
        } = self;
        let out = self.kept_out(row);
        fixture.until(out, near, true);
        fixture.until(out, b, true);
        let apply = |text: String| fixture.kube.apply_text(&text);
        apply(row.object("good", "near")).expect("apply");
        fixture.until(out, near, false);

        // An update that is invalid: the last good version stays.
        write_past_schema(&fixture.kube, row.crd, &row.invalid("good", "near"));
        let stays = "the last good version stays in force";
        self.is_told(row, ("good", 2), stays, 1);
        let says = |status: &Value| of(&status["inForce"], row, "good").is_some();
        let status = &fixture.mesh_node(1, row.kind, says)["status"];
        let in_force = of(&status["inForce"], row, "good").expect("in force");
        assert_eq!(in_force["generation"], 1, "the last good one: {in_force}");
        assert!(!does_reach(out, near), "{}: it opened", row.kind);
        self.rest_goes_on(row);

        // One that never was good closes whom it selects, and nobody else.
        apply(row.invalid("new", "b")).expect("apply");
        fixture.until(out, b, false);
        self.is_told(row, ("new", 1), row.instead, 2);
        assert!(!does_reach(out, near), "{}: it opened", row.kind);
        self.rest_goes_on(row);
        self.delete(row, "new");
        fixture.until(out, b, true);
        self.delete(row, "good");
        fixture.until(out, near, true);
        for node in [1, 2] {
            fixture.mesh_node(node, "no rejections", |status| {
                status["rejections"].is_null()
            });
            self.counted(node, 0, row);
        }
    }

    /// Every node says which field of the object is wrong, in what way, and what holds instead.
    fn is_told(&self, row: &Row, (name, generation): (&str, u64), instead: &str, all: u32) {
        for node in [1, 2] {
            let says = |status: &Value| of(&status["rejections"], row, name).is_some();
            let status = &self.fixture.mesh_node(node, row.kind, says)["status"];
            let rejection = of(&status["rejections"], row, name).expect("a rejection");
            assert_eq!(rejection["object"]["generation"], generation, "{rejection}");
            assert_eq!(rejection["field"], row.field, "{rejection}");
            let message = rejection["message"].as_str().expect("a message");
            let (wrong, then) = message.rsplit_once("; ").expect("two parts");
            assert!(wrong.contains(row.bad), "{message}");
            assert_eq!(then, instead, "{rejection}");
            self.counted(node, all, row);
            let page = self
                .fixture
                .mesh
                .agent(node)
                .ask("/status")
                .expect("status");
            let listed = page["rejections"].as_array().expect("a list");
            let is_it = |one: &Value| one["field"] == row.field && one["consequence"] == instead;
            assert!(listed.iter().any(is_it), "{page}");
        }
    }

    /// A node's metric says how much is rejected: what an alert is raised by.
    fn counted(&self, node: u8, fields: u32, row: &Row) {
        let agent = self.fixture.mesh.agent(node);
        let metric = || {
            let page = agent.metrics().expect("metrics");
            mesh_test::mesh::sum(&page, "mesh_rejected_fields", &[])
        };
        eventually("rejected fields to be counted", SOON, || {
            (metric() == f64::from(fields)).then_some(())
        })
        .with_context(|| format!("{}: {} of {fields} on node {node}", row.kind, metric()))
        .expect("counted");
    }
}

/// Returns the entry of an object in a list of a node's report.
fn of(list: &Value, row: &Row, name: &str) -> Option<Value> {
    let mut all = list.as_array()?.iter();
    let found = all.find(|one| {
        let object = one.get("object").unwrap_or(one);
        object["kind"] == row.kind && object["name"] == name
    });
    found.cloned()
}

#[test]
fn invalid_objects_fail_closed_and_others_stay_enforced() {
    let mut fixture = Fixture::open();
    fixture.kube.namespace("plain", &[]).expect("namespace");
    let plain = fixture.add_in("plain", "plain", 1);
    let [a, near, b] = ["a", "near", "b"].map(|name| fixture.mesh.pod(name));
    let _servers = [&a, &near, &b].map(|pod| serve(pod));
    let scene = Scene {
        fixture,
        a,
        near,
        b,
        plain,
    };
    for row in &ROWS {
        scene.check(row);
    }
}

/// Of a kind that this version does not act on.
const TRAFFIC: &str = "
apiVersion: mesh.rs/v1alpha1
kind: MeshTrafficPolicy
metadata: {name: broken, namespace: default}
spec: SPEC
";

#[test]
fn invalid_objects_of_unused_kinds_are_ignored() {
    let fixture = Fixture::open();
    let [a, near, b] = ["a", "near", "b"].map(|name| fixture.mesh.pod(name));
    let _servers = [&near, &b].map(|pod| serve(pod));
    fixture.until(&a, &b, true);
    fixture.kube.apply_text(DENY).expect("apply");
    fixture.until(&a, &near, false);
    let storm = storm(&a, &b);

    let crd = "meshtrafficpolicies.mesh.rs";
    let specs = ["{targetRef: [b], retry: {attempts: many}}", "nonsense"];
    write_past_schema(&fixture.kube, crd, &TRAFFIC.replace("SPEC", specs[0]));
    fixture
        .kube
        .apply_text(&TRAFFIC.replace("SPEC", specs[1]))
        .expect("an update");
    for node in [1, 2] {
        let named = eventually("the object to be named", SOON, || {
            let page = fixture.mesh.agent(node).ask("/status").ok()?;
            let warnings = page["warnings"].as_array()?.iter();
            let mut named = warnings.filter(|one| one["object"].to_string().contains("broken"));
            named.next().cloned().map(|one| (one, page.clone()))
        });
        let (warning, page) = named.with_context(|| fixture.logs()).expect("named");
        let kind = warning["object"].to_string();
        assert!(kind.contains("MeshTrafficPolicy"), "{warning}");
        assert_eq!(
            warning["what"],
            "MeshTrafficPolicy has no effect in this version"
        );
        let rejections = page["rejections"].as_array().expect("rejections");
        assert_eq!(rejections.len(), 1, "node {node}: {rejections:?}");
        assert_eq!(rejections[0]["object"], "MeshTrafficPolicy default/broken");
        assert_eq!(rejections[0]["consequence"], "the object is ignored");
    }
    assert!(!does_reach(&a, &near), "it opened");
    // The other kinds are followed as before.
    let open = DENY.replace("policyTypes: [Ingress]", "ingress: [{}]");
    fixture.kube.apply_text(&open).expect("apply");
    fixture.until(&a, &near, true);
    fixture.kube.apply_text(DENY).expect("apply");
    fixture.until(&a, &near, false);
    fixture
        .kube
        .kubectl(["delete", crd, "broken"])
        .expect("delete");
    assert!(!does_reach(&a, &near), "it opened");
    unharmed(&storm);
}

/// One that is valid, whose peer only names of domains could tell: by that kind's API it matches
/// nothing.
const NAMES: &str = "
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: names}
spec:
  tier: Admin
  priority: 7
  subject: {namespaces: {matchLabels: {absent: nobody}}}
  egress: [{action: Accept, to: [{domainNames: [example.com]}]}]
";

#[test]
fn domain_name_rules_are_reported_in_node_status() {
    let fixture = Fixture::open();
    fixture.kube.apply_text(NAMES).expect("apply");
    let field = "spec.egress[0].to[0].domainNames";
    for node in [1, 2] {
        let names = |status: &Value| status["warnings"][0]["field"] == field;
        let now = fixture.mesh_node(node, "the warning", names);
        let warning = &now["status"]["warnings"][0];
        assert_eq!(warning["object"]["kind"], "ClusterNetworkPolicy", "{now}");
        assert_eq!(warning["object"]["name"], "names", "{now}");
        let message = warning["message"].as_str().expect("a message");
        assert!(message.contains("matches nothing"), "{message}");
    }
    let delete = ["delete", "clusternetworkpolicy", "names"];
    fixture.kube.kubectl(delete).expect("delete");
    fixture.mesh_node(1, "no warnings", |status| status["warnings"].is_null());
}
