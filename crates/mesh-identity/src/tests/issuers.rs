// SPDX-License-Identifier: Apache-2.0
//! `self:` and `files:` with real directories and, for the first, real processes.

use std::{os::unix::fs::PermissionsExt as _, path::Path, process::Command, sync::Arc};

use super::pki::{Agent, Hand, Leaf, Root, config, id, shake, want};
use crate::{Ca, Error, Identities};

async fn agent(dir: &Path, names: &[&str]) -> Result<(Identities, super::pki::Wanted), Error> {
    let (wanted, ids) = want(names);
    let config = config(Ca::SelfSigned(dir.to_owned()), Hand::new().clock());
    let identities = Identities::start(config, ids).await?;
    for name in names {
        identities.ready(&id(name)).await?;
    }
    Ok((identities, wanted))
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn agents_that_share_a_directory_believe_each_other() {
    let top = tempfile::tempdir().unwrap();
    let dir = top.path().join("new").join("ca");
    let (a, _a) = agent(&dir, &["web"]).await.unwrap();
    let (b, _b) = agent(&dir, &["db"]).await.unwrap();
    assert_eq!(
        (
            mode(&dir),
            mode(&dir.join("ca.pem")),
            mode(&dir.join("ca.crt"))
        ),
        (0o700, 0o600, 0o644)
    );
    let client = a.client(&id("web"), &id("db")).unwrap();
    let (client, server) = shake(client, b.server(&id("db")).unwrap()).await;
    assert_eq!(a.who(client.unwrap().get_ref().1), Ok(id("db")));
    assert_eq!(b.who(server.unwrap().get_ref().1), Ok(id("web")));
    let mut names: Vec<_> = dir
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["ca.crt", "ca.pem"], "nothing else is left behind");
    let published = std::fs::read_to_string(dir.join("ca.crt")).unwrap();
    assert!(published.starts_with("-----BEGIN CERTIFICATE-----"));
    assert!(!published.contains("PRIVATE"));
}

/// Set in the children of the test below.
const CHILD: &str = "MESH_TEST_SHARED_CA";

#[tokio::test]
async fn processes_that_start_at_once_make_one_ca() {
    if let Some(dir) = std::env::var_os(CHILD) {
        // A child: all wait for this file, so that all begin together.
        let dir = Path::new(&dir);
        while !dir.join("go").exists() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        let (identities, _wanted) = agent(&dir.join("ca"), &["web"]).await.unwrap();
        let revision = identities.subscribe().borrow().bundle().revision();
        println!("revision {revision:016x}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let test = "processes_that_start_at_once_make_one_ca";
    let children: Vec<_> = (0..6)
        .map(|_| {
            Command::new(std::env::current_exe().unwrap())
                .args([test, "--nocapture", "--test-threads=1"])
                .env(CHILD, dir.path())
                .stdout(std::process::Stdio::piped())
                .stderr(std::process::Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    std::fs::write(dir.path().join("go"), "").unwrap();
    let mut revisions = std::collections::BTreeSet::new();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        let (_, revision) = text
            .split_once("revision ")
            .expect("the child said its revision");
        revisions.insert(revision[..16].to_owned());
    }
    assert_eq!(revisions.len(), 1, "{revisions:?}");
}

#[tokio::test]
async fn a_ca_key_that_others_can_read_is_not_used() {
    let dir = tempfile::tempdir().unwrap();
    agent(dir.path(), &["web"]).await.unwrap();
    let pem = dir.path().join("ca.pem");
    std::fs::set_permissions(&pem, std::fs::Permissions::from_mode(0o640)).unwrap();
    let Err(Error::Issuer(why)) = agent(dir.path(), &["web"]).await.map(drop) else {
        panic!("used");
    };
    assert!(
        why.to_string().contains("ca.pem") && why.to_string().contains("600"),
        "{why}"
    );
}

#[tokio::test]
async fn a_broken_ca_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let pem = dir.path().join("ca.pem");
    std::fs::write(&pem, "-----BEGIN NOTHING-----").unwrap();
    std::fs::set_permissions(&pem, std::fs::Permissions::from_mode(0o600)).unwrap();
    let Err(Error::Issuer(why)) = agent(dir.path(), &["web"]).await.map(drop) else {
        panic!("used");
    };
    assert!(why.to_string().contains("ca.pem"), "{why}");
}

#[tokio::test(start_paused = true)]
async fn files_that_are_wrong_or_half_written_leave_the_last_good_certificate() {
    let agent = Agent::start().await;
    let identities = &agent.identities;
    let dir = agent.dir.path();
    let before = identities.certificate(&id("web")).unwrap();
    let same = || Arc::ptr_eq(&before, &identities.certificate(&id("web")).unwrap());
    let settle = || tokio::time::sleep(std::time::Duration::from_secs(10));
    let web = dir.join("shop/web");
    let now = agent.hand.now();

    std::fs::write(web.join("tls.crt"), "-----BEGIN CERT").unwrap();
    settle().await;
    assert!(same(), "half a file");
    agent.root.write(dir, "web", Leaf::good("db", now));
    settle().await;
    assert!(same(), "somebody else's certificate");
    agent.root.write(
        dir,
        "web",
        Leaf {
            not_after: now,
            ..Leaf::good("web", now)
        },
    );
    settle().await;
    assert!(same(), "an expired one");
    agent.root.write(dir, "web", Leaf::good("web", now));
    std::fs::write(web.join("ca.crt"), Root::new(now).pem).unwrap();
    settle().await;
    assert!(same(), "not signed by its ca.crt");
    agent.root.write(dir, "web", Leaf::good("web", now));
    std::fs::copy(dir.join("shop/db/tls.key"), web.join("tls.key")).unwrap();
    settle().await;
    assert!(same(), "another key");
    std::fs::remove_file(web.join("tls.key")).unwrap();
    settle().await;
    assert!(same(), "a file is missing");

    agent.root.write(dir, "web", Leaf::good("web", now));
    let mut changes = identities.subscribe();
    let epoch = identities.epoch(&id("web"));
    changes
        .wait_for(|now| now.epoch(&id("web")) != epoch)
        .await
        .unwrap();
    assert!(!same(), "a good one again");
}
