use super::*;

fn messages() -> Vec<Vec<u8>> {
    let full = Request {
        client: Some("[fd00::1]:40000".parse().unwrap()),
        traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
        host: Some("cart.shop.svc.cluster.local".into()),
        ..Request::to("10.1.2.3:8080".parse().unwrap())
    };
    let bare = Request::to("[fd00::2]:443".parse().unwrap());
    let mut messages: Vec<Vec<u8>> = [
        Message::Data(b"GET / HTTP/1.1"),
        Message::Data(&[7; MAX_DATA]),
        Message::Request(Box::new(full)),
        Message::Request(Box::new(bare)),
        Message::Accepted,
        Message::End,
        Message::Reset,
        Message::Drain,
    ]
    .iter()
    .map(Message::encode)
    .collect();
    messages.extend(Reason::ALL.map(|reason| Message::Refused(reason, "because").encode()));
    messages
}

#[test]
fn what_is_written_is_read() {
    for bytes in messages() {
        assert_eq!(Message::decode(&bytes).unwrap().encode(), bytes);
    }
}

#[test]
fn bytes_are_as_documented() {
    let request = Request { host: Some("a.b".into()), ..Request::to("10.1.2.3:8080".parse().unwrap()) };
    let bytes = Message::Request(Box::new(request)).encode();
    assert_eq!(bytes, [1, 4, 10, 1, 2, 3, 0x1f, 0x90, 0, 2, 0, 3, b'a', b'.', b'b']);
    assert_eq!(Message::Refused(Reason::Timeout, "no").encode(), [3, 3, b'n', b'o']);
    assert_eq!(Message::Data(b"x").encode(), [0, b'x']);
}

#[test]
fn cut_messages_are_refused_or_another_message() {
    for bytes in messages() {
        for end in 0..bytes.len().min(200) {
            if let Ok(message) = Message::decode(&bytes[..end]) {
                assert_eq!(message.encode(), &bytes[..end]);
            }
        }
    }
}

/// Whatever is read is within bounds, and reads the same when written again but for ignored fields.
#[test]
fn mutated_messages_never_panic() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let messages = messages();
    let (mut read, mut refused) = (0, 0);
    for _round in 0..200_000 {
        let mut bytes = messages[random(messages.len())].clone();
        bytes.truncate(400);
        for _change in 0..=random(4) {
            let place = random(bytes.len());
            match random(3) {
                0 => bytes[place] ^= 1 << random(8),
                1 => bytes.insert(place, random(256) as u8),
                _ if bytes.len() > 1 => drop(bytes.remove(place)),
                _ => {}
            }
        }
        match Message::decode(&bytes) {
            Ok(message) => {
                read += 1;
                let again = message.encode();
                assert!(again.len() <= bytes.len());
                assert_eq!(Message::decode(&again).unwrap(), message);
            }
            Err(_) => refused += 1,
        }
    }
    assert!(read > 10_000 && refused > 10_000, "{read} {refused}");
}

#[test]
fn unknown_fields_are_ignored_unless_they_are_critical() {
    let mut bytes = Message::Request(Box::new(Request::to("10.1.2.3:80".parse().unwrap()))).encode();
    let length = bytes.len();
    bytes.extend([9, 0, 1, 0]);
    assert!(matches!(Message::decode(&bytes), Ok(Message::Request(_))));
    bytes[length] |= 0x80;
    assert_eq!(Message::decode(&bytes), Err(Malformed::UnknownField(0x89)));
}

#[test]
fn long_texts_are_cut_at_a_character() {
    let text = "ü".repeat(1000);
    let bytes = Message::Refused(Reason::Policy, &text).encode();
    assert!(
        matches!(Message::decode(&bytes), Ok(Message::Refused(Reason::Policy, text)) if text.len() == 256)
    );
}

#[test]
fn only_a_clean_end_allows_the_next_request() {
    let open = Order::Asked.client_received(&Message::Accepted).unwrap();
    let half = open.client_received(&Message::End).unwrap();
    assert_ne!(half, Order::Idle);
    assert_eq!(half.sent_end(), Order::Idle);
    assert_eq!(open.sent_end().client_received(&Message::End), Ok(Order::Idle));
    assert_eq!(half.client_received(&Message::Data(b"x")), Err(OutOfOrder));
    assert_eq!(half.client_received(&Message::End), Err(OutOfOrder));
    assert_eq!(open.client_received(&Message::Reset), Ok(Order::Over));
}

#[test]
fn each_end_says_only_what_is_its_own() {
    let request = Message::Request(Box::new(Request::to("10.1.2.3:80".parse().unwrap())));
    assert_eq!(Order::Idle.server_received(&request), Ok(Order::Asked));
    assert_eq!(Order::Idle.client_received(&request), Err(OutOfOrder));
    let open = Order::Asked.accepted();
    for message in [Message::Accepted, Message::Drain, Message::Refused(Reason::Policy, "")] {
        assert_eq!(open.server_received(&message), Err(OutOfOrder));
    }
    // A second request while there is a stream.
    assert_eq!(open.server_received(&request), Err(OutOfOrder));
    assert_eq!(Order::Idle.server_received(&Message::Data(b"x")), Err(OutOfOrder));
}
