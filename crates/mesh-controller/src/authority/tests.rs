// SPDX-License-Identifier: Apache-2.0
//! Rotation of roots and intermediates, and invalid CA material.

use super::*;

const LIFETIMES: Lifetimes = Lifetimes {
    leaf: Duration::from_secs(3600),
    overlap: Duration::from_secs(60),
};

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
}

fn authority(material: &Material) -> Result<Authority, Error> {
    Authority::new(material, &["ca.test".to_owned()], LIFETIMES, at(0))
}

fn step(material: &Material, request: Option<&str>, seconds: u64) -> Option<Material> {
    material
        .next(request, "cluster.local", LIFETIMES, at(seconds))
        .unwrap()
}

#[test]
fn root_is_published_before_it_signs_and_until_its_last_leaf_expires() {
    let first = Material::new("cluster.local", at(0)).unwrap();
    assert!(step(&first, None, 100).is_none(), "no request");
    let published = step(&first, Some("1"), 100).unwrap();
    assert_eq!(published.root.certificate, first.root.certificate);
    assert_eq!(authority(&published).unwrap().roots, 2);
    assert!(
        step(&published, Some("1"), 159).is_none(),
        "within the overlap"
    );
    assert!(
        step(&published, Some("2"), 159).is_none(),
        "a second request waits"
    );

    let switched = step(&published, Some("1"), 160).unwrap();
    assert_ne!(switched.root.certificate, first.root.certificate);
    let signs = authority(&switched).unwrap();
    assert_eq!(signs.roots, 2);
    assert!(signs.bundle.contains(first.root.certificate.trim()));
    assert!(step(&switched, Some("1"), 160 + 3659).is_none());

    let done = step(&switched, Some("1"), 160 + 3660).unwrap();
    assert_eq!(authority(&done).unwrap().roots, 1);
    assert!(
        step(&done, Some("1"), 9999).is_none(),
        "a request is carried out once"
    );
    assert!(step(&done, Some("2"), 9999).is_some());
}

#[test]
fn intermediate_is_replaced_before_expiry_if_the_root_key_is_there() {
    let first = Material::new("cluster.local", at(0)).unwrap();
    let late = 300 * 24 * 3600;
    let next = step(&first, None, late).unwrap();
    assert_eq!(next.root.certificate, first.root.certificate);
    assert_ne!(
        next.intermediate.certificate,
        first.intermediate.certificate
    );
    authority(&next).unwrap();
    let mut offline = first.clone();
    offline.root.key = Zeroizing::default();
    assert!(step(&offline, None, late).is_none());
    offline.intermediate = CertificateAndKey::default();
    let none = offline.next(None, "cluster.local", LIFETIMES, at(0));
    assert!(matches!(none, Err(Error::NoRootKey)));
}

#[test]
fn mismatched_material_is_rejected() {
    let one = Material::new("cluster.local", at(0)).unwrap();
    let two = Material::new("cluster.local", at(0)).unwrap();
    let mut mixed = one.clone();
    mixed.root = two.root.clone();
    assert!(matches!(authority(&mixed), Err(Error::Issuer(..))));
    let mut mixed = one.clone();
    mixed.intermediate.key = two.intermediate.key.clone();
    assert!(matches!(authority(&mixed), Err(Error::OtherKey(_))));
    let mut garbage = one;
    garbage.root.certificate = "garbage".to_owned();
    assert!(matches!(authority(&garbage), Err(Error::Certificate(_))));
}
