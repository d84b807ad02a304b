// SPDX-License-Identifier: Apache-2.0
//! The shop of deploy/examples as Deployments: real Debian programs in containers, from the node's
//! /usr.

use std::fs;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Installed, deploy};
use crate::apps::SHOP_SQL;
use crate::cluster::BASE;

/// URL of the web front end's Service.
pub(crate) const WEB: &str = "http://10.96.0.20";
/// Clients: one that policy allows, one that it denies, and one outside the mesh.
pub(crate) const CLIENT: (&str, &str) = ("clients", "client");
pub(crate) const INTRUDER: (&str, &str) = ("clients", "intruder");
pub(crate) const PLAIN: (&str, &str) = ("outside", "plain");

/// One application of the shop.
struct App<'a> {
    namespace: &'a str,
    name: &'a str,
    /// Value of the label `app` and name of the service account.
    app: &'a str,
    node: &'a str,
    script: String,
    probe: Option<Value>,
    env: Value,
}

impl App<'_> {
    /// Returns the application's Deployment, whose containers write to /data and /tmp.
    fn deployment(&self, shop: &str) -> Value {
        let labels = json!({ "app": self.app, "deployment": self.name });
        let mount = |name: &str, path: &str, only: bool| json!({ "name": name, "mountPath": path, "readOnly": only });
        let mut container = json!({
            "name": self.name, "image": BASE, "env": self.env,
            "command": ["/bin/sh", "-ec", self.script],
            "volumeMounts": [
                mount("usr", "/usr", true), mount("shop", "/opt", true), mount("data", "/data", false),
            ],
        });
        if let Some(probe) = &self.probe {
            container["readinessProbe"] = probe.clone();
            container["livenessProbe"] = probe.clone();
            container["livenessProbe"]["failureThreshold"] = json!(5);
        }
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": { "namespace": self.namespace, "name": self.name },
            "spec": {
                "replicas": 1, "selector": { "matchLabels": labels },
                "template": {
                    "metadata": { "labels": labels },
                    "spec": {
                        "serviceAccountName": self.app,
                        "nodeSelector": { "kubernetes.io/hostname": self.node },
                        "terminationGracePeriodSeconds": 1,
                        "containers": [container],
                        "volumes": [
                            { "name": "usr", "hostPath": { "path": "/usr" } },
                            { "name": "shop", "hostPath": { "path": shop } },
                            { "name": "data", "emptyDir": {} },
                        ],
                    },
                },
            },
        })
    }
}

const NGINX: &str = r#"
mkdir -p /data/nginx
cat >/data/nginx.conf <<'END'
daemon off; user root; pid /data/pid; error_log stderr;
events { worker_connections 1024; }
http {
  client_body_temp_path /data/nginx/1; proxy_temp_path /data/nginx/2; fastcgi_temp_path /data/nginx/3;
  uwsgi_temp_path /data/nginx/4; scgi_temp_path /data/nginx/5; access_log off;
  server { listen 8080; listen [::]:8080;
    location /front { return 200 "the front\n"; }
    location / { proxy_pass http://10.96.0.21:8000; proxy_set_header X-Real-IP $remote_addr; } }
}
END
# Requests that are being answered end before it does.
trap 'sleep 1; kill -QUIT $child' TERM
nginx -e stderr -c /data/nginx.conf & child=$!
wait $child; wait $child"#;

fn postgres() -> String {
    format!(
        "bin=$(ls -d /usr/lib/postgresql/*/bin | tail -n 1); rm -rf /data/pg; mkdir -p /data/pg; \
         chown postgres /data /data/pg; \
         as() {{ setpriv --reuid 100 --regid 100 --clear-groups \"$@\"; }}; cd /data; \
         as $bin/initdb -U postgres --auth=trust --no-sync --locale=C --encoding=UTF8 -D /data/pg; \
         echo 'host all all 0.0.0.0/0 trust' >>/data/pg/pg_hba.conf; \
         echo 'host all all ::/0 trust' >>/data/pg/pg_hba.conf; \
         echo '{SHOP_SQL}' | as $bin/postgres --single -D /data/pg postgres; \
         exec setpriv --reuid 100 --regid 100 --clear-groups $bin/postgres -D /data/pg \
           -c unix_socket_directories=/data -c 'listen_addresses=*' -c fsync=off -c shared_buffers=16MB"
    )
}

fn tcp(port: u16) -> Option<Value> {
    Some(json!({ "tcpSocket": { "port": port }, "periodSeconds": 1 }))
}

fn http(path: &str, port: u16) -> Option<Value> {
    Some(json!({ "httpGet": { "path": path, "port": port }, "periodSeconds": 1 }))
}

/// Returns the applications: clients on node 1, servers on node 2.
fn apps() -> Vec<App<'static>> {
    let client = |namespace, name, app, node| App {
        namespace,
        name,
        app,
        node,
        script: "exec sleep infinity".to_owned(),
        probe: None,
        env: json!([]),
    };
    let server = |name, node, script: &str, probe| App {
        namespace: "shop",
        name,
        app: name,
        node,
        script: script.to_owned(),
        probe,
        env: json!([]),
    };
    let redis = "exec redis-server --port 6379 --dir /data --bind '*' '-::*' --save '' --appendonly no --protected-mode no";
    let mut all = vec![
        client("clients", "client", "client", "node1"),
        client("clients", "intruder", "intruder", "node1"),
        client("outside", "plain", "client", "node1"),
        server("web", "node2", NGINX, http("/front", 8080)),
        server("redis", "node2", redis, tcp(6379)),
        server("postgres", "node2", &postgres(), tcp(5432)),
    ];
    let mut app = server(
        "app",
        "node1",
        "exec python3 /opt/app.py",
        http("/healthz", 8000),
    );
    app.env = json!([
        { "name": "LISTEN", "value": "[::]:8000" },
        { "name": "REDIS", "value": "10.96.0.22:6379" },
        { "name": "POSTGRES", "value": "10.96.0.23:5432" },
    ]);
    all.push(app);
    all
}

impl Installed {
    /// Applies the example and its Deployments, and waits until all are rolled out, which requires
    /// that the kubelet's probes pass, under Strict, too.
    pub(super) fn shop(&self) -> Result<()> {
        let kube = self.cluster().kube();
        let dir = deploy("examples/shop")?;
        for name in [
            "namespaces",
            "serviceaccounts",
            "services",
            "policies",
            "authentication",
        ] {
            let path = dir.join(name).with_extension("yaml");
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            kube.apply_text(&text)?;
        }
        let shop = dir.display().to_string();
        let apps = apps();
        let all: Vec<String> = apps
            .iter()
            .map(|app| app.deployment(&shop).to_string())
            .collect();
        kube.apply_text(&all.join("\n---\n"))?;
        apps.iter().try_for_each(|app| {
            let name = format!("deployment/{}", app.name);
            self.cluster().rolled_out(app.namespace, &name)
        })
    }
}
