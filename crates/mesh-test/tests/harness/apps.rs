// SPDX-License-Identifier: Apache-2.0
//! The applications without a mesh, and the shop that is built of them.

use std::time::Duration;

use mesh_test::apps::{Content, Nginx, SHOP_SQL, Shop, postgres, redis};
use mesh_test::{Families, Lab, PodSpec, Topology, eventually};
use serde_json::Value;

#[test]
fn shop_order_passes_through_all_services() {
    let lab = Lab::builder(Topology::Routed)
        .pod(PodSpec::new("client", 1))
        .pod(PodSpec::new("front", 2))
        .pod(PodSpec::new("shop", 1))
        .pod(PodSpec::new("redis", 2).families(Families::V4))
        .pod(PodSpec::new("postgres", 2).families(Families::V6))
        .build()
        .expect("lab");
    let [client, front, shop, cache, store] =
        ["client", "front", "shop", "redis", "postgres"].map(|name| lab.pod(name));
    let _redis = redis(&cache, 6379).expect("redis");
    let _postgres = postgres(&store, 5432, SHOP_SQL).expect("postgres");
    let (redis_at, postgres_at) = (
        format!("{}:6379", cache.v4()),
        format!("[{}]:5432", store.v6()),
    );
    let mut app = Shop::start(&shop, 8080, &redis_at, &postgres_at).expect("shop");
    let behind = format!("http://{}:8080", shop.v4());
    let nginx = Nginx::start(&front, 80, Content::Proxy(&behind)).expect("nginx");

    let capture = lab.capture_wire().expect("capture");
    let order = client.curl(&format!("http://{}/order?item=teapot4711", front.v4()));
    let order: Value = order
        .expect("curl")
        .ok()
        .expect("order")
        .json()
        .expect("json");
    assert_eq!(
        (&order["order"], &order["sold"]),
        (&1.into(), &1.into()),
        "{order}"
    );
    let page = client
        .curl(&format!("http://[{}]/", front.v6()))
        .expect("curl");
    let page: Value = page.ok().expect("page").json().expect("json");
    assert_eq!(page["visits"], 1, "{page}");
    assert_eq!(page["orders"][0]["item"], "teapot4711", "{page}");

    let seen = capture.stop().expect("stop");
    assert_eq!(seen.tcp_ports(), [80, 5432, 6379, 8080]);
    let hits = seen.find(b"teapot4711").expect("complete");
    let mut ports: Vec<u16> = hits
        .iter()
        .filter_map(|hit| hit.flow.map(|(_, _, dst)| dst.port()))
        .collect();
    ports.retain(|port| [80, 5432, 6379, 8080].contains(port));
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports, [80, 5432, 6379, 8080], "in clear on every leg");

    // Each application saw the address of the pod before it.
    let clients: Vec<_> = nginx
        .requests()
        .expect("log")
        .into_iter()
        .map(|r| (r.client.ip(), r.status))
        .collect();
    assert_eq!(
        clients,
        [(client.v4().into(), 200), (client.v6().into(), 200)]
    );
    let clients: Vec<_> = app
        .requests()
        .expect("log")
        .iter()
        .map(|r| r.client.ip())
        .collect();
    assert_eq!(clients, [std::net::IpAddr::from(front.v4()); 2]);

    app.process.kill().expect("kill");
    let broken = eventually("nginx to notice", Duration::from_secs(5), || {
        let page = client
            .curl(&format!("http://{}/", front.v4()))
            .expect("curl")
            .text();
        page.contains("502 Bad Gateway").then_some(())
    });
    broken.expect("bad gateway");
}
