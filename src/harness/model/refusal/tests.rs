use super::*;

fn denial(rule: Rule, reason: &str) -> Denial {
    Denial { rule, reason: reason.into() }
}

/// Returns whether the official client libraries of both providers would retry: they check the header first, then the status.
fn is_tried_again(reply: &Response<Body>) -> bool {
    match reply.headers().get("x-should-retry").map(HeaderValue::as_bytes) {
        Some(b"true") => true,
        Some(b"false") => false,
        _ => by_status(reply),
    }
}

fn by_status(reply: &Response<Body>) -> bool {
    matches!(reply.status().as_u16(), 408 | 409 | 429 | 500..)
}

#[test]
fn a_client_tries_again_what_time_can_change_and_nothing_else() {
    for api in [Api::ChatCompletions, Api::Responses, Api::Messages] {
        for rule in Rule::ALL {
            let reply = refusal(api, &denial(*rule, "r"));
            let helps = rule.again() != Again::Never;
            assert_eq!(is_tried_again(&reply), helps, "{rule}");
            // Clients that do not know the header decide in the same way, except when the upstream's certificate is wrong.
            assert_eq!(by_status(&reply), helps || *rule == Rule::UpstreamTls, "{rule}: {}", reply.status());
            assert_eq!(reply.headers().contains_key(header::RETRY_AFTER), helps, "{rule}");
            assert_eq!(reply.headers()[crate::wire::RULE], rule.as_str());
        }
    }
}

#[test]
fn a_refusal_has_the_shape_of_its_apis_errors() {
    let of = |api, rule, reason: &str| error(api, &denial(rule, reason), status(rule));
    let told = of(Api::ChatCompletions, Rule::ModelRequest, "`previous_response_id` is denied: send it all");
    assert_eq!(told["error"]["type"], "invalid_request_error");
    assert_eq!(told["error"]["code"], "model.request");
    assert_eq!(told["error"]["param"], "previous_response_id");
    let message = told["error"]["message"].as_str().unwrap();
    assert!(message.contains("model.request") && message.contains("another request"), "{message}");
    let told = of(Api::Responses, Rule::Tokens, "the `token` limit");
    assert_eq!((told["error"]["type"].as_str(), &told["error"]["param"]), (Some("belay_denied"), &Value::Null));
    for (rule, kind) in [
        (Rule::ModelRequest, "invalid_request_error"),
        (Rule::Tokens, "permission_error"),
        (Rule::Busy, "rate_limit_error"),
        (Rule::Evidence, "api_error"),
        (Rule::UpstreamReply, "api_error"),
    ] {
        let told = of(Api::Messages, rule, "r");
        assert_eq!((told["type"].as_str(), told["error"]["type"].as_str()), (Some("error"), Some(kind)));
        assert!(told["error"]["message"].as_str().unwrap().contains(rule.as_str()));
    }
}

/// Codex begins each conversation with a WebSocket, and continues without one only after this status.
#[test]
fn who_wants_a_websocket_is_told_to_go_on_without() {
    let headers = |pairs: &[(&'static str, &'static str)]| {
        pairs.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    };
    let websocket: HeaderMap = headers(&[("connection", "Upgrade"), ("upgrade", "websocket")]);
    assert_eq!(wrong_method(&websocket), StatusCode::UPGRADE_REQUIRED);
    assert_eq!(wrong_method(&headers(&[("accept", "text/event-stream")])), StatusCode::METHOD_NOT_ALLOWED);
}

/// These words make Anthropic's tool runner send the whole conversation again.
#[test]
fn a_client_is_told_that_no_thread_is_held() {
    let details = |api, rule, reason: &str| error(api, &denial(rule, reason), status(rule))["error"]["details"].clone();
    let told = details(Api::Messages, Rule::ModelRequest, "`thread` at /thread is denied: send the whole conversation");
    assert_eq!(told, json!({"error_code": "thread_unsupported_request", "unsupported": ["thread"]}));
    for (api, rule, reason) in [
        (Api::Messages, Rule::ModelRequest, "`threads` is unknown"),
        (Api::Messages, Rule::ModelRequest, "`tools` has a `thread`"),
        (Api::Messages, Rule::ModelRequest, "the request cannot be read"),
        (Api::Messages, Rule::Tokens, "`thread` and all"),
        (Api::Responses, Rule::ModelRequest, "`thread` at /thread is denied"),
        (Api::ChatCompletions, Rule::ModelRequest, "`thread` at /thread is denied"),
    ] {
        assert_eq!(details(api, rule, reason), Value::Null, "{api:?} {rule} {reason}");
    }
}

#[test]
fn a_stream_that_has_begun_ends_with_an_event_of_its_api() {
    let denial = denial(Rule::UpstreamSecret, "it repeats the credential");
    for (api, first, at) in [
        (Api::ChatCompletions, "data: ", "/error/code"),
        (Api::Responses, "event: error\ndata: ", "/code"),
        (Api::Messages, "event: error\ndata: ", "/error/message"),
    ] {
        let event = event(api, &denial);
        let data = event.strip_prefix(first).and_then(|event| event.strip_suffix("\n\n")).unwrap();
        let data: Value = serde_json::from_str(data).unwrap();
        assert!(data.pointer(at).and_then(Value::as_str).unwrap().contains("upstream.secret"), "{data}");
    }
}
