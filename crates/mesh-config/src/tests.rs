// SPDX-License-Identifier: Apache-2.0
//! Tests the parsing of command line, environment and file.

use std::collections::BTreeMap;
use std::io::Write as _;

use super::*;

#[derive(Default)]
struct Fake {
    env: BTreeMap<&'static str, &'static str>,
    mountinfo: Option<&'static str>,
}

const MOUNTS: &str = "\
22 1 0:20 / /sys rw - sysfs sysfs rw
30 22 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw
31 30 0:27 /docker/x /some\\040place rw shared:3 - cgroup2 cgroup2 rw
32 30 0:27 / /sys/fs/cgroup/unified rw,relatime shared:9 master:1 - cgroup2 cgroup2 rw,nsdelegate
";

impl Surroundings for Fake {
    fn env(&self, name: &str) -> Option<String> {
        self.env.get(name).map(|value| (*value).to_owned())
    }

    fn mountinfo(&self) -> std::io::Result<String> {
        Ok(self.mountinfo.unwrap_or(MOUNTS).to_owned())
    }

    fn parallelism(&self) -> NonZeroUsize {
        NonZeroUsize::new(7).unwrap()
    }
}

fn parse_in(around: &Fake, args: &[&str]) -> Result<AgentCommand, Error> {
    parse_agent(
        std::iter::once("mesh-agent")
            .chain(args.iter().copied())
            .map(OsString::from),
        around,
    )
}

const NEEDED: [&str; 7] = [
    "run", "--node", "n1", "--source", "dir:/m", "--ca", "self:/ca",
];

fn run(more: &[&str]) -> Result<Config, Error> {
    let args = [&NEEDED, more].concat();
    let AgentCommand::Run(config) = parse_in(&Fake::default(), &args)? else {
        panic!("not run")
    };
    Ok(*config)
}

#[test]
fn defaults() {
    let config = run(&[]).unwrap();
    let log = LogConfig {
        format: LogFormat::Text,
        level: "info".to_owned(),
    };
    assert_eq!(
        config,
        Config {
            node: "n1".to_owned(),
            source: Source::Dir("/m".into()),
            kubeconfig: None,
            proc: "/proc".into(),
            cri_socket: None,
            ca: Ca::SelfSigned("/ca".into()),
            trust_domain: "cluster.local".to_owned(),
            trust_domain_aliases: Vec::new(),
            crls: Vec::new(),
            host: HostConfig {
                cgroup: "/sys/fs/cgroup/unified".into(),
                bpffs: "/sys/fs/bpf".into(),
                state_dir: "/var/lib/mesh".into(),
                cni_conf: "/etc/cni/net.d".into(),
                log: log.clone(),
            },
            admin: vec![AdminAddr::Unix("/run/mesh/agent.sock".into())],
            metrics: "[::]:15020".parse().unwrap(),
            probes: "127.0.0.1:15021".parse().unwrap(),
            flow_log: FlowLog::Stdout,
            drain: Duration::from_secs(10),
            pod_cidrs: Vec::new(),
            workers: NonZeroUsize::new(7).unwrap(),
            tunnel_port: TunnelPort::Fixed(TUNNEL_PORT),
            deny: Deny::Reject,
            trace_datapath: false,
            log,
        }
    );
}

#[test]
fn valid_values_are_parsed() {
    let c = |more: &[&str]| run(more).unwrap();
    assert_eq!(c(&["--source", "kubernetes"]).source, Source::Kubernetes);
    assert_eq!(c(&["--ca", "files:/x"]).ca, Ca::Files("/x".into()));
    assert_eq!(
        c(&["--ca", "grpc:https://ca:15012"]).ca,
        Ca::Grpc(GrpcCa {
            url: "https://ca:15012".to_owned(),
            token: "/var/run/secrets/tokens/mesh".into(),
            bundle: "/var/run/secrets/mesh/ca.crt".into(),
            cluster: "Kubernetes".to_owned(),
        })
    );
    assert_eq!(c(&["--flow-log", "off"]).flow_log, FlowLog::Off);
    assert_eq!(
        c(&["--flow-log", "file:/f"]).flow_log,
        FlowLog::File("/f".into())
    );
    assert_eq!(c(&["--drain", "1500ms"]).drain, Duration::from_millis(1500));
    assert_eq!(c(&["--drain", "2m"]).drain, Duration::from_secs(120));
    assert_eq!(c(&["--workers", "3"]).workers.get(), 3);
    assert_eq!(c(&["--deny", "drop"]).deny, Deny::Drop);
    assert_eq!(c(&["--cgroup", "/"]).host.cgroup, PathBuf::from("/"));
    assert_eq!(c(&["--log", "json"]).log.format, LogFormat::Json);
    let level = "warn,mesh_agent::proxy=debug";
    assert_eq!(c(&["--log-level", level]).host.log.level, level);
    let several = c(&["--pod-cidr", "10.1.0.0/16", "--pod-cidr", "fd00::/48"]);
    assert_eq!(several.pod_cidrs.len(), 2);
    let admin = c(&["--admin", "unix:/a", "--admin", "127.0.0.1:15000"]).admin;
    assert_eq!(
        admin,
        [
            AdminAddr::Unix("/a".into()),
            AdminAddr::Tcp("127.0.0.1:15000".parse().unwrap())
        ]
    );
}

#[test]
fn invalid_values_are_reported_with_their_flag() {
    let long = format!("/{}", "x".repeat(100));
    for (flag, value, why) in [
        ("--node", "Node_1", "DNS name"),
        (
            "--source",
            "directory:/m",
            "expected dir:PATH or kubernetes",
        ),
        ("--source", "dir:", "expected dir:PATH"),
        ("--ca", "/etc/ca", "expected grpc:URL"),
        ("--ca", "grpc:http://ca", "https"),
        ("--trust-domain", "a..b", "DNS name"),
        ("--cgroup", "/does/not/exist", "not a directory"),
        ("--admin", "agent.sock", "absolute path"),
        ("--admin", "10.0.0.1:15000", "not a loopback"),
        ("--admin", &long, "too long"),
        ("--metrics", "15020", "expected IP:PORT"),
        ("--flow-log", "stderr", "expected stdout"),
        ("--drain", "10", "expected a number with ms"),
        ("--drain", "99999999999999999h", "too long"),
        ("--pod-cidr", "10.1.2.3/16", "did you mean 10.1.0.0/16"),
        ("--workers", "0", "from 1 to 1024"),
        ("--tunnel-port", "15009", "expected 15008 or real"),
        ("--deny", "allow", "reject or drop"),
        ("--trace-datapath", "yes", "on or off"),
        ("--log", "xml", "text or json"),
        ("--log-level", "mesh=loud", "expected a level"),
    ] {
        let error = run(&[flag, value]).expect_err(value);
        let text = error.to_string();
        assert_eq!(error.exit_code(), 78, "{text}");
        assert!(text.starts_with(&format!("{flag}: {value:?}")), "{text}");
        assert!(text.contains(why), "{text}");
    }
}

#[test]
fn invalid_command_line_is_a_usage_error() {
    for args in [&["run", "--nod", "x"][..], &["fly"], &[]] {
        assert_eq!(
            parse_in(&Fake::default(), args).unwrap_err().exit_code(),
            2,
            "{args:?}"
        );
    }
    for args in [&["--help"][..], &["run", "--help"], &["--version"]] {
        assert_eq!(
            parse_in(&Fake::default(), args).unwrap_err().exit_code(),
            0,
            "{args:?}"
        );
    }
}

#[test]
fn missing_setting_is_reported() {
    let error = parse_in(&Fake::default(), &["run"]).unwrap_err();
    assert_eq!(error.exit_code(), 78);
    assert!(
        error
            .to_string()
            .starts_with("--node is required (or MESH_NODE"),
        "{error}"
    );

    let none = Fake {
        mountinfo: Some(""),
        ..Fake::default()
    };
    let error = parse_in(&none, &["check"]).unwrap_err().to_string();
    assert!(
        error.contains("no cgroup2 file system is mounted"),
        "{error}"
    );
}

fn file(content: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(content.as_bytes()).unwrap();
    file
}

#[test]
fn flag_overrides_environment_and_environment_overrides_file() {
    let file = file(
        "node = \"from-file\"\nsource = 'dir:/file'\nca = 'self:/file'\nworkers = 2\n\
         pod-cidr = ['10.1.0.0/16', '10.2.0.0/16']\n",
    );
    let path = file.path().to_str().unwrap();
    let around = Fake {
        env: BTreeMap::from([
            ("MESH_NODE", "from-env"),
            ("MESH_SOURCE", "dir:/env"),
            ("MESH_ADMIN", "/a, 127.0.0.1:1"),
            ("MESH_DRAIN", ""),
        ]),
        ..Fake::default()
    };
    let args = ["run", "--config", path, "--node", "from-flag"];
    let AgentCommand::Run(config) = parse_in(&around, &args).unwrap() else {
        panic!("not run")
    };
    assert_eq!(config.node, "from-flag");
    assert_eq!(config.source, Source::Dir("/env".into()));
    assert_eq!(config.ca, Ca::SelfSigned("/file".into()));
    assert_eq!(config.workers.get(), 2);
    assert_eq!(config.pod_cidrs.len(), 2);
    assert_eq!(config.admin.len(), 2);
    assert_eq!(
        config.drain,
        Duration::from_secs(10),
        "an empty variable counts as not set"
    );
}

#[test]
fn errors_state_the_origin_of_the_value() {
    let around = Fake {
        env: BTreeMap::from([("MESH_DRAIN", "soon")]),
        ..Fake::default()
    };
    let error = parse_in(&around, &NEEDED).unwrap_err().to_string();
    assert!(error.starts_with("MESH_DRAIN: \"soon\""), "{error}");

    for (content, expected) in [
        ("drain = \"soon\"", ": drain: \"soon\""),
        ("drain = true", ": drain: \"true\": expected DURATION"),
        (
            "drian = \"10s\"",
            "unknown key \"drian\"; valid keys are node, source",
        ),
        ("drain = ", "not valid TOML"),
        ("[drain]\na = 1", "expected DURATION"),
    ] {
        let file = file(content);
        let path = file.path().to_str().unwrap();
        let error = run(&["--config", path]).unwrap_err();
        assert_eq!(error.exit_code(), 78);
        let text = error.to_string();
        assert!(text.starts_with(path) && text.contains(expected), "{text}");
    }
    let error = run(&["--config", "/does/not/exist"]).unwrap_err();
    assert_eq!(error.exit_code(), 78);
}

#[test]
fn one_file_serves_every_subcommand() {
    let file = file("node = 'n'\nbpffs = '/b'\n");
    let args = ["cleanup", "--config", file.path().to_str().unwrap()];
    let AgentCommand::Cleanup(host) = parse_in(&Fake::default(), &args).unwrap() else {
        panic!("not cleanup")
    };
    assert_eq!(host.bpffs, PathBuf::from("/b"));
    let error = parse_in(&Fake::default(), &["check", "--node", "n"]).unwrap_err();
    assert_eq!(error.exit_code(), 2, "check has no --node");
}

#[test]
fn mount_of_the_whole_cgroup2_hierarchy_is_preferred() {
    assert_eq!(cgroup2_mount(MOUNTS), Some("/sys/fs/cgroup/unified".into()));
    let first = MOUNTS.lines().take(3).collect::<Vec<_>>().join("\n");
    assert_eq!(cgroup2_mount(&first), Some("/some place".into()));
    assert_eq!(cgroup2_mount("22 1 0:20 / /sys rw - sysfs sysfs rw"), None);
}

#[test]
fn reference_is_up_to_date() {
    mesh_fixtures::golden("docs/configuration.md", &reference());
}

#[test]
fn controller_needs_no_node_settings() {
    let parsed = parse_controller(
        ["mesh-controller", "run", "--replica", "a", "--lease", "3s"].map(Into::into),
        &Fake::default(),
    );
    let ControllerCommand::Run(config) = parsed.unwrap() else {
        panic!("another command");
    };
    assert_eq!(config.namespace, "mesh-system");
    assert_eq!(config.listen, "[::]:15012".parse().unwrap());
    assert_eq!(config.lease, Duration::from_secs(3));
    assert_eq!(config.certificate_life, Duration::from_secs(24 * 3600));
    for (flag, value) in [
        ("--certificate-life", "25h"),
        ("--lease", "1s"),
        ("--node", "n"),
    ] {
        let wrong = ["mesh-controller", "run", "--replica", "a", flag, value];
        assert!(
            parse_controller(wrong.map(Into::into), &Fake::default()).is_err(),
            "{flag}"
        );
    }
}
