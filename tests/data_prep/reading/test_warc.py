"""WARC and WET files against datatrove's own reader and from any position."""

import io
import re

import pytest
from datatrove.pipeline.readers import WarcReader
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from data_prep.common.command_line import UserError
from data_prep.reading.readers import Cursor
from data_prep.reading.sources import Source
from tests.data_prep.test_clean import essay

PAGES = 120


def page(number: int) -> bytes:
    """One in three in an old encoding."""
    paragraphs = "".join(f"<p>{essay(10 * number + i)} Café número {number}.</p>" for i in range(3))
    html = f"<html><head><title>Page {number}</title></head><body><nav><a href='/'>Home</a></nav>{paragraphs}"
    return f"{html}<footer>Imprint</footer></body></html>".encode("latin-1" if number % 3 == 0 else "utf-8")


def write_warc(path, gzip: bool) -> None:
    """Responses among their requests, and pictures."""
    headers = [("Content-Type", "text/html"), ("X-Padding", "x" * 200)]
    with open(path, "wb") as file:
        writer = WARCWriter(file, gzip=gzip)
        for number in range(PAGES):
            url = f"http://example.org/{number}"
            request = StatusAndHeaders("GET / HTTP/1.0", [("Host", "example.org")], is_http_request=True)
            writer.write_record(writer.create_warc_record(url, "request", http_headers=request))
            kind, content = ("image/png", b"\x89PNG\r\n\x1a\n") if number % 5 == 4 else ("text/html", page(number))
            writer.write_record(
                writer.create_warc_record(
                    url,
                    "response",
                    payload=io.BytesIO(content),
                    http_headers=StatusAndHeaders("200 OK", headers, protocol="HTTP/1.0"),
                    warc_headers_dict={"WARC-Identified-Payload-Type": kind} if number % 2 else {},
                )
            )


def write_wet(path) -> None:
    with open(path, "wb") as file:
        writer = WARCWriter(file, gzip=True)
        for number in range(PAGES):
            options = {"payload": io.BytesIO(essay(number).encode()), "warc_content_type": "text/plain"}
            headers = {"WARC-Identified-Payload-Type": "text/plain"}
            writer.write_record(
                writer.create_warc_record(f"http://a.org/{number}", "conversion", **options, warc_headers_dict=headers)
            )


@pytest.fixture(params=["a.warc.gz", "a.warc", "a.warc.wet.gz"])
def archive(request, tmp_path):
    path = tmp_path / request.param
    write_wet(path) if ".wet" in path.name else write_warc(path, gzip=path.suffix == ".gz")
    return path


def test_pages_are_those_of_datatrove(archive):
    expected = list(WarcReader(str(archive.parent)).run())
    records = list(Source(str(archive)).resolve().records())
    assert [record["text"] for record in records] == [document.text for document in expected]
    assert [record["url"] for record in records] == [document.metadata["url"] for document in expected]
    assert [record["id"] for record in records] == [document.id for document in expected]
    assert len(records) == (PAGES if ".wet" in archive.name else PAGES * 4 // 5)
    if ".wet" not in archive.name:
        assert records[0]["text"] == page(0).decode("latin-1") and records[1]["text"] == page(1).decode()


def test_reading_goes_on_at_any_block(archive, monkeypatch):
    monkeypatch.setattr("data_prep.reading.readers.BLOCK_CHARACTERS", 5000)
    corpus = Source(str(archive)).resolve()
    blocks = list(corpus.blocks(Cursor()))
    assert len(blocks) > 10 and sum(block.size for block in blocks) == pytest.approx(archive.stat().st_size, abs=2000)
    for number in range(0, len(blocks), 7):
        later = list(corpus.blocks(blocks[number].start))
        assert [block.texts for block in later] == [block.texts for block in blocks[number:]]
        assert [block.stop for block in later] == [block.stop for block in blocks[number:]]


@pytest.mark.parametrize("content", [b"no archive", b"not\na\n", b"\x1f\x8b no gzip", b"WARC/1.0\r\nbroken"])
def test_a_file_of_another_format(tmp_path, content):
    (tmp_path / "a.warc.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.warc\.gz, (after )?record \d+: ") as caught:
        list(Source(str(tmp_path)).resolve().documents())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.warc.gz", "a.warc"])
def test_a_file_that_is_cut_is_not_taken_for_a_whole_one(tmp_path, name):
    """Within the last two records and one of their headers."""
    write_warc(tmp_path / name, gzip=name.endswith(".gz"))
    content = (tmp_path / name).read_bytes()
    starts = [found.start() for found in re.finditer(rb"\x1f\x8b\x08" if name.endswith(".gz") else b"WARC/1", content)]
    for size in (
        starts[-2] + 5,
        starts[-2] + 100,
        starts[-1] - 40,
        starts[-1] + 5,
        starts[-1] + 100,
        len(content) - 40,
    ):
        (tmp_path / name).write_bytes(content[:size])
        with pytest.raises(UserError, match=r"the file ends within|its header is not whole|not WARC"):
            list(Source(str(tmp_path / name)).resolve().documents())
