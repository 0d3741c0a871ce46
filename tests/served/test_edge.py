"""The edge of HTTP through Serve's own proxy: hosts, pages of others, absolute URLs, HEAD, ranges, endless headers."""

import socket

import httpx
import openai
import pytest

from tests.support.served_application import ServedApplication, error_of

pytestmark = pytest.mark.timeout(600)  # the first test starts Ray


def test_a_url_of_an_answer_is_fetched_as_it_is_in_parts_and_by_head(served: ServedApplication) -> None:
    [stored] = served.pictures(prompt="a small cat", seed=1, response_format="url")
    whole, head = httpx.get(stored["url"]), httpx.head(stored["url"])
    assert stored["url"].startswith(f"{served.url}/v1/files/images/")
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-length", "content-type", "etag", "last-modified", "accept-ranges"):
        assert head.headers[name] == whole.headers[name]
    part = httpx.get(stored["url"], headers={"range": "bytes=1-3", "if-range": whole.headers["etag"]})
    assert (part.status_code, part.content) == (206, b"PNG")
    assert httpx.get(stored["url"], headers={"if-none-match": whole.headers["etag"]}).status_code == 304
    assert httpx.head(f"{served.url}/health").status_code == 200


def test_a_page_that_rebinds_its_name_to_the_server_or_posts_to_it_is_refused(served: ServedApplication) -> None:
    rebound = httpx.get(f"{served.url}/v1/models", headers={"host": "evil.example:8000"})
    assert (rebound.status_code, error_of(rebound)["code"]) == (403, "host_not_allowed")
    posted = httpx.post(
        f"{served.url}/v1/images/edits", data={"prompt": "x"}, headers={"origin": "https://evil.example"}
    )
    assert (posted.status_code, error_of(posted)["code"]) == (403, "cross_site_request")


def test_a_caller_on_this_machine_cannot_pass_for_a_proxy(served: ServedApplication) -> None:
    """uvicorn believes X-Forwarded-Proto and -For of 127.0.0.1."""
    lies = {"x-forwarded-proto": "https", "x-forwarded-host": "evil.example", "x-forwarded-for": "10.0.0.9"}
    answer = httpx.post(
        f"{served.url}/v1/images/generations", json={"prompt": "x", "response_format": "url"}, headers=lies, timeout=60
    )
    assert answer.json()["data"][0]["url"].startswith(f"{served.url}/v1/files/")


def test_a_model_of_another_id_with_slashes_is_asked_for_by_its_whole_id(served: ServedApplication) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        for model in ("black-forest-labs/FLUX.1-dev", "black-forest-labs%2FFLUX.1-dev"):
            with pytest.raises(openai.NotFoundError, match=model):
                client.models.retrieve(model)


def test_headers_without_end_are_not_read_on_by_serves_proxy(served: ServedApplication) -> None:
    address = httpx.URL(served.url)
    with socket.create_connection((address.host, address.port), timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        with pytest.raises(ConnectionError):
            connection.sendall(b"a: b\r\n" * 10_000_000)
