// SPDX-License-Identifier: Apache-2.0
//! Certificates, keys and kubeconfigs of a test control plane.
//!
//! One CA signs everything, as in a kubeadm cluster, but without the separate front-proxy CA.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use serde_json::json;

/// First address of the service CIDR, which is `kubernetes.default.svc`.
const SERVICE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1));

const NAMES: &[&str] = &[
    "localhost",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
];

/// The CA, and the directory of everything that it issued.
#[derive(Debug)]
pub(super) struct Pki {
    dir: PathBuf,
    ca: Issuer<'static, KeyPair>,
}

impl Pki {
    /// Creates the CA, the API server's certificate for `address`, and the service account key.
    pub(super) fn create(dir: &Path, address: IpAddr) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let mut params = subject("test-ca", None);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        let key = KeyPair::generate()?;
        fs::write(dir.join("ca.crt"), params.self_signed(&key)?.pem())?;
        fs::write(dir.join("ca.key"), key.serialize_pem())?;
        let this = Self {
            dir: dir.to_owned(),
            ca: Issuer::new(params, key),
        };
        let mut server = subject("kube-apiserver", None);
        server.subject_alt_names = NAMES
            .iter()
            .map(|name| Ok(SanType::DnsName((*name).try_into()?)))
            .collect::<Result<_>>()?;
        let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let addresses = [address, local, SERVICE].map(SanType::IpAddress);
        server.subject_alt_names.extend(addresses);
        this.sign("apiserver", server, &[ExtendedKeyUsagePurpose::ServerAuth])?;
        let kubelet_client = subject("kube-apiserver-kubelet-client", Some("system:masters"));
        this.sign(
            "kubelet-client",
            kubelet_client,
            &[ExtendedKeyUsagePurpose::ClientAuth],
        )?;
        let accounts = KeyPair::generate()?;
        fs::write(dir.join("sa.key"), accounts.serialize_pem())?;
        fs::write(dir.join("sa.pub"), accounts.public_key_pem())?;
        Ok(this)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(super) fn ca(&self) -> PathBuf {
        self.path("ca.crt")
    }

    /// Writes a kubeconfig with a client certificate.
    pub(super) fn client(&self, url: &str, name: &str, group: Option<&str>) -> Result<PathBuf> {
        let (certificate, key) = self.sign(
            &file_name(name),
            subject(name, group),
            &[ExtendedKeyUsagePurpose::ClientAuth],
        )?;
        let user = json!({ "client-certificate": certificate, "client-key": key });
        self.kubeconfig(url, name, user)
    }

    /// Writes a kubeconfig that reads a bearer token from a file.
    pub(super) fn token_client(&self, url: &str, name: &str, token: &Path) -> Result<PathBuf> {
        self.kubeconfig(url, name, json!({ "tokenFile": token }))
    }

    /// Issues the certificate and key of a kubelet, for client and server use.
    pub(super) fn node(&self, name: &str, address: IpAddr) -> Result<(PathBuf, PathBuf)> {
        let mut params = subject(&format!("system:node:{name}"), Some("system:nodes"));
        params.subject_alt_names = vec![
            SanType::DnsName(name.try_into()?),
            SanType::IpAddress(address),
        ];
        let both = [
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        self.sign(&format!("node-{name}"), params, &both)
    }

    fn sign(
        &self,
        file: &str,
        mut params: CertificateParams,
        usage: &[ExtendedKeyUsagePurpose],
    ) -> Result<(PathBuf, PathBuf)> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = usage.to_vec();
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.ca)?;
        let paths = (
            self.path(&format!("{file}.crt")),
            self.path(&format!("{file}.key")),
        );
        fs::write(&paths.0, certificate.pem())?;
        fs::write(&paths.1, key.serialize_pem())?;
        Ok(paths)
    }

    /// Writes the kubeconfig as JSON, which is valid YAML.
    fn kubeconfig(&self, url: &str, name: &str, user: serde_json::Value) -> Result<PathBuf> {
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{
                "name": "test",
                "cluster": { "server": url, "certificate-authority": self.ca() },
            }],
            "users": [{ "name": name, "user": user }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": name } }],
            "current-context": "test",
        });
        let path = self.path(&format!("{}.kubeconfig", file_name(name)));
        fs::write(&path, serde_json::to_vec_pretty(&config)?)?;
        Ok(path)
    }
}

fn file_name(user: &str) -> String {
    user.replace([':', '/'], "-")
}

fn subject(name: &str, group: Option<&str>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    if let Some(group) = group {
        params
            .distinguished_name
            .push(DnType::OrganizationName, group);
    }
    params
}
