// SPDX-License-Identifier: Apache-2.0
//! Rules about single files: license line, code in doc comments, length, words, servers, line ends.

use super::File;

/// Longest source file.
const MAX_LINES: usize = 600;

/// Longer files, each with the reason.
const LONG: &[(&str, &str)] = &[];

/// Crates that are linked into a kernel object, which must be compatible with the GPL.
const KERNEL_CRATES: &[&str] = &["mesh-common/", "mesh-ebpf/"];
const KERNEL_LICENSE: &str = "MIT OR GPL-2.0-only OR Apache-2.0";
const LICENSE: &str = "Apache-2.0";

/// Written in two halves, so that this file does not contain them. Matched without case.
const WORDS: &[(&str, &str)] = &[
    (
        concat!("proto", "type"),
        "says where code comes from, not what it does",
    ),
    (concat!("FIX", "ME"), "finish it, or write down the limit"),
    (concat!("TO", "DO:"), "finish it, or write down the limit"),
    (concat!("/wo", "rk/"), "a path of somebody's machine"),
    (concat!("/ro", "ot/."), "a path of somebody's machine"),
    (concat!("/tmp/", "bg"), "a path of somebody's machine"),
    (concat!("<<<<", "<<<"), "a merge that was not finished"),
];

/// Servers that text may point a reader to. Packages and images come from wherever the machine
/// gets its own: no registry is named.
const SERVERS: &[&str] = &[
    "docs.kernel.org",
    "gateway-api.sigs.k8s.io",
    "github.com",
    "json-schema.org",
    "keepachangelog.com",
    "kubernetes.io",
    "lore.kernel.org",
    "network-policy-api.sigs.k8s.io",
    "prometheus.io",
    "semver.org",
    "spdx.org",
    "spiffe.io",
    "www.apache.org",
    "www.gnu.org",
    "www.kernel.org",
    "www.rfc-editor.org",
];

/// Files that a tool writes and owns.
const FOREIGN: &[&str] = &["Cargo.lock", "go.sum", "go.mod"];

/// Inputs of programs, of any bytes.
const INPUTS: &str = "fuzz/corpus/";

pub(super) fn check(file: &File) -> Vec<String> {
    let name = file.path.rsplit('/').next().unwrap_or(&file.path);
    if FOREIGN.contains(&name) || file.path.starts_with(INPUTS) {
        return Vec::new();
    }
    let mut findings = Vec::new();
    let mut find = |line: usize, what: String| {
        findings.push(format!("{}:{line}: {what}", file.path));
    };
    if let Some(what) = license(file) {
        find(1, what);
    }
    let lines = file.text.lines().count();
    if file.has_extension("rs")
        && lines > MAX_LINES
        && !LONG.iter().any(|(path, _)| *path == file.path)
    {
        find(
            lines,
            format!("{lines} lines, more than {MAX_LINES}: split it"),
        );
    }
    if file.has_extension("rs") {
        for line in doc_code(&file.text) {
            find(line, "code in a doc comment, which no test runs".to_owned());
        }
    }
    for (index, line) in file.text.split('\n').enumerate() {
        let number = index + 1;
        if line.contains('\r') {
            find(number, "a Windows line end".to_owned());
        }
        let lower = line.to_lowercase();
        for (word, why) in WORDS {
            if lower.contains(&word.to_lowercase()) {
                find(number, format!("`{word}`: {why}"));
            }
        }
        for server in servers(line).filter(|server| !may_be_named(server)) {
            find(
                number,
                format!("the server {server} is not one that the tree may name"),
            );
        }
    }
    findings
}

/// The lines that begin a code block which rustdoc would compile and run. Each such block is a
/// program of its own to link, and `cargo xtask test` does not run them.
fn doc_code(text: &str) -> Vec<usize> {
    let mut open = false;
    let mut found = Vec::new();
    for (index, line) in text.lines().map(str::trim).enumerate() {
        let comment = line
            .strip_prefix("///")
            .or_else(|| line.strip_prefix("//!"));
        let Some(language) = comment.and_then(|text| text.trim().strip_prefix("```")) else {
            continue;
        };
        if !open && (language.is_empty() || language.starts_with("rust")) {
            found.push(index + 1);
        }
        open = !open;
    }
    found
}

fn license(file: &File) -> Option<String> {
    let comment = if file.has_extension("rs") {
        "//"
    } else if file.has_extension("toml") {
        "#"
    } else {
        return None;
    };
    let kernel = KERNEL_CRATES.iter().any(|dir| file.path.starts_with(dir));
    let license = if kernel && file.has_extension("rs") {
        KERNEL_LICENSE
    } else {
        LICENSE
    };
    let wanted = format!("{comment} SPDX-License-Identifier: {license}");
    (file.text.lines().next() != Some(&wanted)).then(|| format!("the first line is not `{wanted}`"))
}

/// The hosts of the web addresses in a line.
fn servers(line: &str) -> impl Iterator<Item = &str> {
    line.match_indices("://").filter_map(|(at, mark)| {
        let scheme = line[..at]
            .rsplit(|c: char| !c.is_ascii_alphanumeric())
            .next()?;
        let rest = &line[at + mark.len()..];
        let end = rest
            .find(|c: char| !(c.is_ascii_alphanumeric() || c == '.' || c == '-'))
            .unwrap_or(rest.len());
        let host = &rest[..end];
        (matches!(scheme, "http" | "https" | "git" | "ssh") && host.contains('.')).then_some(host)
    })
}

/// Listed, an address in numbers, or a name that no real server can have (RFC 2606, RFC 6762).
fn may_be_named(host: &str) -> bool {
    let host = host.trim_end_matches('.');
    let top = host.rsplit('.').next().unwrap_or(host);
    SERVERS.contains(&host)
        || top.chars().all(|c| c.is_ascii_digit())
        || matches!(
            top,
            "example" | "invalid" | "local" | "localhost" | "test" | "svc"
        )
        || host == "example.com"
        || host.ends_with(".example.com")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(path: &str, text: &str) -> Vec<String> {
        check(&File {
            path: path.to_owned(),
            text: text.to_owned(),
        })
    }

    #[test]
    fn license_line_is_first_and_of_the_crate() {
        assert!(findings("a/src/x.rs", "// SPDX-License-Identifier: Apache-2.0\n").is_empty());
        assert_eq!(findings("a/src/x.rs", "//! x\n").len(), 1);
        assert_eq!(findings("a/x.toml", "[a]\n").len(), 1);
        let both = format!("// SPDX-License-Identifier: {KERNEL_LICENSE}\n");
        assert!(findings("mesh-ebpf/src/x.rs", &both).is_empty());
        assert_eq!(findings("xtask/src/x.rs", &both).len(), 1);
    }

    #[test]
    fn long_files_windows_line_endings_and_words_are_found() {
        let long = format!(
            "// SPDX-License-Identifier: Apache-2.0\n{}",
            "\n".repeat(MAX_LINES)
        );
        assert_eq!(findings("a/x.rs", &long).len(), 1);
        assert!(findings("a/x.md", &long).is_empty());
        assert_eq!(findings("a/x.md", "a\r\nb\r\n").len(), 2);
        for (word, _) in WORDS {
            assert_eq!(
                findings("a/x.md", &format!("see {word}")).len(),
                1,
                "{word}"
            );
        }
    }

    #[test]
    fn code_in_doc_comments_is_found() {
        let text =
            "/// ```text\n/// a -> b\n/// ```\n//! ```\n//! f();\n//! ```\n// ```\n/// ```rust\n";
        assert_eq!(doc_code(text), [4, 8]);
    }

    #[test]
    fn only_listed_and_reserved_hosts_may_be_named() {
        let bad = format!("get it from https{}cdn.somewhere.org/x or here", "://");
        assert_eq!(findings("a/x.md", &bad).len(), 1);
        let good = "http://10.0.0.1:80/ https://github.com/a/b http://shop.default.svc:80 \
                    spiffe://cluster.local/ns/a http://www.example.com http://web/";
        assert_eq!(findings("a/x.md", good), Vec::<String>::new());
    }
}
