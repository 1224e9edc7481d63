"""Downloads are complete or fail with a message, and happen once."""

import hashlib
import http.server
import subprocess
import sys
import threading

import pytest
import torch
from helpers import ROOT, TINY, classifier_state, tiny

from overlock_mm import OverLoCK, load_checkpoint
from overlock_mm.checkpoint import RELEASE, download, downloading
from overlock_mm.checkpoint.downloading import cached
from overlock_mm.errors import CheckpointError


class Server(http.server.BaseHTTPRequestHandler):
    content = b''
    requests = []

    def do_GET(self):
        self.requests.append(self.path)
        if self.path == '/moved.pth':
            self.send_response(302)
            self.send_header('Location', '/weights.pth')
            self.end_headers()
            return
        if self.path == '/none.pth':
            self.send_error(404)
            return
        if self.path == '/chunks.pth':
            self.send_response(200)
            self.send_header('Transfer-Encoding', 'chunked')
            self.end_headers()
            self.wfile.write(b'ffff\r\nless')
            return
        if self.path == '/page.pth':
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'<html>log in</html>')
            return
        self.send_response(200)
        self.send_header('Content-Length', str(len(self.content)))
        self.end_headers()
        half = len(self.content) // 2
        self.wfile.write(self.content[:half])
        if self.path == '/stalls.pth':
            self.server.stop.wait(10)
        elif self.path != '/truncated.pth':
            self.wfile.write(self.content[half:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    torch.save(classifier_state(tiny()), tmp_path / 'source.pth')
    monkeypatch.setattr(Server, 'content', (tmp_path / 'source.pth').read_bytes())
    monkeypatch.setattr(Server, 'requests', [])
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    monkeypatch.setattr(downloading, '_TIMEOUT', 0.5)
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server) as running:
        running.stop = threading.Event()
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{running.server_port}'
        running.stop.set()
        running.shutdown()


def files(folder):
    return [path for path in folder.iterdir() if path.suffix != '.lock']


@pytest.mark.parametrize('name', ['weights.pth', 'moved.pth'])
def test_download(tmp_path, server, name, monkeypatch):
    model = OverLoCK(TINY, init_cfg=dict(type='Pretrained', checkpoint=f'{server}/{name}'))
    model.init_weights()
    assert torch.equal(model.patch_embed1[0].weight, tiny().patch_embed1[0].weight)
    path = cached(f'{server}/{name}')
    assert path.read_bytes() == Server.content and files(path.parent) == [path]
    monkeypatch.setattr(Server, 'content', b'changed')
    assert download(f'{server}/{name}').read_bytes() != b'changed'  # from the cache


@pytest.mark.parametrize(
    'name, reason',
    [
        ('truncated.pth', 'it ended after .* bytes|incomplete|IncompleteRead'),
        ('stalls.pth', 'timed out'),
        ('none.pth', 'Not Found'),
        ('chunks.pth', 'IncompleteRead'),
        ('page.pth', 'it is a web page'),
        ('no status.pth', "can't contain control characters"),
    ],
)
def test_a_download_that_fails_leaves_nothing(tmp_path, server, name, reason):
    with pytest.raises(CheckpointError, match=reason) as error:
        load_checkpoint(tiny(), f'{server}/{name}')
    path = cached(f'{server}/{name}')
    assert f'place it at {path}' in str(error.value)
    assert files(tmp_path / 'hub/checkpoints') == []


def test_where_downloads_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    released = cached(f'{RELEASE}overlock_t_in1k_224.pth')
    assert released == tmp_path / 'checkpoints/overlock_t_in1k_224.pth'  # as by torch.hub
    others = {cached(f'https://example.com/{i}/model.safetensors') for i in 'ab'}
    assert len(others) == 2 and {path.suffix for path in others} == {'.safetensors'}
    monkeypatch.setattr(torch.hub, '_hub_dir', '/dev/null')
    with pytest.raises(CheckpointError, match='cannot be downloaded'):
        download('https://example.com/model.pth')


def test_checksum(server):
    right = hashlib.sha256(Server.content).hexdigest()
    with pytest.raises(CheckpointError, match=f'SHA-256 is {right[:16]}.* not 00112233'):
        download(f'{server}/weights-00112233.pth')
    assert download(f'{server}/weights-{right[:8]}.pth').exists()


def test_several_processes_download_once(tmp_path, server):
    url = f'{server}/weights.pth'
    code = f"""
import torch
from overlock_mm.checkpoint import download
torch.hub.set_dir({str(tmp_path / 'hub')!r})
print(download({url!r}))
"""
    command = [sys.executable, '-c', code]
    started = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    printed = {process.communicate()[0].strip() for process in started}
    assert printed == {str(cached(url))} and not any(p.returncode for p in started)
    assert Server.requests.count('/weights.pth') == 1
    assert cached(url).read_bytes() == Server.content
