// SPDX-License-Identifier: Apache-2.0
//! The messages of `istio.v1.auth.IstioCertificateService`, with Istio's field numbers.

use std::collections::BTreeMap;

/// The one method of the service.
pub const CREATE_CERTIFICATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// The field of the request's metadata that names whose certificate an agent asks for.
pub const IMPERSONATED: &str = "ImpersonatedIdentity";

/// `IstioCertificateRequest`; field 2 is not in use.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CertificateRequest {
    /// PKCS#10 in PEM.
    #[prost(string, tag = "1")]
    pub csr: String,
    /// In seconds.
    #[prost(int64, tag = "3")]
    pub validity_duration: i64,
    /// The workload that the certificate is for: see [`IMPERSONATED`].
    #[prost(message, optional, tag = "4")]
    pub metadata: Option<Struct>,
}

/// `google.protobuf.Struct`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Struct {
    /// The fields by name.
    #[prost(btree_map = "string, message", tag = "1")]
    pub fields: BTreeMap<String, Value>,
}

/// `google.protobuf.Value`, of which only strings are of use here.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Value {
    /// The value, if it is a string.
    #[prost(string, optional, tag = "3")]
    pub string: Option<String>,
}

/// `IstioCertificateResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CertificateResponse {
    /// The leaf first, the root last; each is PEM, and may hold more than one certificate.
    #[prost(string, repeated, tag = "1")]
    pub cert_chain: Vec<String>,
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    #[test]
    fn the_bytes_are_those_of_istio() {
        let value = Value {
            string: Some("v".to_owned()),
        };
        let request = CertificateRequest {
            csr: "c".to_owned(),
            validity_duration: 86_400,
            metadata: Some(Struct {
                fields: BTreeMap::from([("k".to_owned(), value)]),
            }),
        };
        let expected = [
            [0x0a, 1, b'c'].as_slice(),
            &[0x18, 0x80, 0xa3, 0x05],
            &[0x22, 10, 0x0a, 8, 0x0a, 1, b'k', 0x12, 3, 0x1a, 1, b'v'],
        ];
        assert_eq!(request.encode_to_vec(), expected.concat());
        let response = CertificateResponse {
            cert_chain: vec!["a".to_owned(), "b".to_owned()],
        };
        assert_eq!(response.encode_to_vec(), [0x0a, 1, b'a', 0x0a, 1, b'b']);
    }
}
