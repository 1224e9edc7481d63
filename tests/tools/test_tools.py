"""The command lines, run as a user runs them."""

import json
import pathlib
import pickle
import sys
from pathlib import Path

import mmseg
import pytest
import torch
from helpers import DETECTION, ROOT, SEGMENTATION, TINY, run, tool
from mmengine.config import Config
from mmengine.model.weight_init import PretrainedInit

from overlock_mm import OverLoCK, cli


@pytest.fixture(scope='module')
def segmentor(configs, demo_data):
    """The work dir of a segmentor trained for 6 iterations."""
    run([*tool('train.py'), configs / 'segmentor.py', '--work-dir', 'seg'], demo_data)
    return demo_data / 'seg'


@pytest.fixture(scope='module')
def detector(configs, demo_data):
    run(
        [
            *tool('train.py'),
            configs / 'detector.py',
            '--work-dir',
            'det',
            '--no-pretrained',
        ],
        demo_data,
    )
    return demo_data / 'det'


def weights(path):
    return torch.load(path, weights_only=False)['state_dict']


def test_resuming_equals_training_in_one_go(segmentor, configs, demo_data):
    three, six = weights(segmentor / 'iter_3.pth'), weights(segmentor / 'iter_6.pth')
    assert sum(not torch.equal(three[n], six[n]) for n in six) > 0.9 * len(six)
    train = [*tool('train.py'), configs / 'segmentor.py', '--work-dir', 'again']
    # stop after 3 iterations, as an interruption does
    stop = ['--cfg-options', 'train_cfg.max_iters=3', 'train_cfg.val_interval=3']
    run([*train, '--resume', *stop], demo_data)  # nothing to resume yet
    again = demo_data / 'again'
    latest = again / 'last_checkpoint'
    for resume, recorded in (
        ([], again / 'iter_3.pth'),
        (['again/iter_3.pth'], 'none.pth'),
    ):
        latest.write_text(str(recorded))
        run([*train, '--resume', *resume], demo_data)
        resumed = weights(again / 'iter_6.pth')
        assert set(resumed) == set(six)
        for name in six:
            torch.testing.assert_close(resumed[name], six[name], rtol=1e-4, atol=1e-6)
        (again / 'iter_6.pth').unlink()
    # the latest checkpoint, just deleted, is still recorded
    fails([*train, '--resume'], demo_data, 'iter_6.pth does not exist')


def metrics_in(work_dir):
    log = max(work_dir.glob('*/*.json'))
    return json.loads(log.read_text().splitlines()[-1])


@pytest.fixture(scope='module')
def tested(segmentor, configs, demo_data):
    """Metrics of the trained segmentor; the run draws and saves its predictions."""
    command = [*tool('test.py'), configs / 'segmentor.py', segmentor / 'iter_6.pth']
    command += ['--show-dir', 'seg_pictures', '--out', 'seg_out', '--work-dir', 'seg_test']
    run(command, demo_data)
    return metrics_in(demo_data / 'seg_test')


def test_segmentor_pictures_and_label_maps(tested, demo_data):
    assert 0 <= tested['mIoU'] <= 100
    assert len(list((demo_data / 'seg_pictures').rglob('*.png'))) == 2
    assert len(list((demo_data / 'seg_out').glob('*.png'))) == 2


def test_segmentor_augmented(segmentor, configs, demo_data):
    run(
        [
            *tool('test.py'),
            configs / 'segmentor.py',
            segmentor / 'iter_6.pth',
            '--work-dir',
            'seg_tta',
            '--tta',
        ],
        demo_data,
    )
    assert 0 <= metrics_in(demo_data / 'seg_tta')['mIoU'] <= 100
    dumped = Config.fromfile(demo_data / 'seg_tta/segmentor.py')
    assert dumped.model.type == 'SegTTAModel'


def test_folded_backbone(segmentor, tested, configs, demo_data):
    """Also where training averages weights, and a hook swaps them for testing."""
    command = [*tool('test.py'), configs / 'averaged.py', segmentor / 'iter_6.pth']
    run([*command, '--work-dir', 'folded', '--fold'], demo_data)
    folded = metrics_in(demo_data / 'folded')['mIoU']
    assert folded == pytest.approx(tested['mIoU'], abs=0.5)


def test_a_checkpoint_that_does_not_fit(segmentor, configs, demo_data):
    """Neither testing nor training goes on with half of the weights."""
    checkpoint = segmentor / 'iter_6.pth'
    change = ['--cfg-options', 'model.backbone.context_skip=True']
    test = [*tool('test.py'), configs / 'segmentor.py', checkpoint, *change]
    train = [*tool('train.py'), configs / 'segmentor.py', '--no-pretrained', *change]
    stock = Path(mmseg.__file__).parent / '.mim/tools/test.py'  # MMSegmentation's own
    stock = [sys.executable, stock, configs / 'segmentor.py', checkpoint, *change]
    for command, status in (
        (test, 2),
        ([*train, f'load_from={checkpoint}'], 2),
        (stock, 1),
    ):
        result = run([*command, '--work-dir', 'unfit'], demo_data, status=status)
        line = result.stderr.splitlines()[-1]
        assert line.startswith('error: ') or status == 1 and 'CheckpointError: ' in line
        assert 'missing from the file: backbone.' in line
        assert 'context_skip=False, for a segmentation file' in line


def test_deploy_checkpoint(segmentor, tested, configs, demo_data):
    command = [*tool('deploy_checkpoint.py'), configs / 'segmentor.py']
    command += [segmentor / 'iter_6.pth', 'merged.pth']
    assert 'agree to' in run(command, demo_data).stdout
    merged, trained = weights(demo_data / 'merged.pth'), weights(segmentor / 'iter_6.pth')
    assert not any('origin_bn' in k for k in merged) and len(merged) < len(trained)
    fails(command, demo_data, 'merged.pth exists', '--force')
    again = [*tool('deploy_checkpoint.py'), 'merged.py', 'merged.pth', 'merged.pth']
    fails([*again, '--force'], demo_data, 'merged.pth would be written over')
    test = [*tool('test.py'), 'merged.py', 'merged.pth', '--work-dir', 'merged']
    run(test, demo_data)
    merged_mean = metrics_in(demo_data / 'merged')['mIoU']
    assert merged_mean == pytest.approx(tested['mIoU'], abs=0.5)


def test_convert_checkpoint(segmentor, tested, configs, demo_data):
    command = [*tool('convert_checkpoint.py'), segmentor / 'iter_6.pth']
    verify = ['--verify', configs / 'segmentor.py']
    printed = run([*command, 'former.pth', '--to', 'released', *verify], demo_data).stdout
    assert 'Verified: all of' in printed and 'classes' in printed and 'Wrote' in printed
    former = torch.load(demo_data / 'former.pth')
    assert set(former) == {'meta', 'state_dict'} and former['meta']['CLASSES']
    fails([*command, 'former.pth'], demo_data, 'former.pth exists', '--force')
    keep = ['w.safetensors', '--keep-optimizer']
    fails([*command, *keep], demo_data, 'has no place for --keep-optimizer')
    back = [*tool('convert_checkpoint.py'), 'former.pth', 'back.safetensors', '--half']
    run([*back, '--safetensors'], demo_data)
    test = [*tool('test.py'), configs / 'segmentor.py', 'back.safetensors']
    run([*test, '--work-dir', 'converted'], demo_data)
    converted = metrics_in(demo_data / 'converted')['mIoU']
    assert converted == pytest.approx(tested['mIoU'], abs=0.5)
    broken = former['state_dict']['backbone.blocks1.0.dwconv.bias']
    broken.fill_(float('nan'))
    torch.save(former, demo_data / 'nan.pth')
    nan = [*tool('convert_checkpoint.py'), 'nan.pth', 'out.pth', *verify]
    result = run(nan, demo_data, status=2)
    assert 'not finite; not written' in result.stderr
    assert not (demo_data / 'out.pth').exists()


def test_files_to_write(tmp_path):
    out = tmp_path / 'w.pth'
    assert cli.check_output(out, ['.pth'], False) == out
    for path in (tmp_path / 'w.bin', tmp_path / 'none' / 'w.pth'):
        with pytest.raises(cli.UserError, match='must end in .pth or .safetensors and'):
            cli.check_output(path, ['.pth', '.safetensors'], False)
    out.touch()
    with pytest.raises(cli.UserError, match='w.pth exists; give another name, or --force'):
        cli.check_output(out, ['.pth'], False)
    assert cli.check_output(out, ['.pth'], True) == out


def test_convert_detector(detector, configs, demo_data):
    command = [*tool('convert_checkpoint.py'), detector / 'epoch_1.pth', 'det_former.pth']
    command += ['--to', 'released', '--keep-optimizer', '--verify', configs / 'detector.py']
    score = ['--cfg-options', 'model.test_cfg.rcnn.score_thr=0.0']
    printed = run([*command, *score], demo_data).stdout
    assert 'Verified: all of' in printed and 'noise: 0 objects' not in printed
    former = torch.load(demo_data / 'det_former.pth', weights_only=False)
    assert {'meta', 'state_dict', 'optimizer'} <= set(former)


def test_convert_an_imagenet_file(configs, demo_data):
    torch.manual_seed(0)
    source = OverLoCK(TINY)
    state = {k: v for k, v in source.state_dict().items() if 'extra_norm' not in k}
    torch.save(dict(model=state), demo_data / 'imagenet.pth')
    command = [*tool('convert_checkpoint.py'), 'imagenet.pth', 'dense.pth']
    fails(command, demo_data, 'imagenet.pth is OverLoCK', "'segmentation' or 'detection'")
    verify = ['--verify', configs / 'segmentor.py']
    printed = run([*command, '--to', 'segmentation', *verify], demo_data).stdout
    assert 'Verified: all of' in printed
    source.load_state_dict(weights(demo_data / 'dense.pth'), strict=True)


def test_a_file_that_must_be_trusted(configs, demo_data):
    """A tool says what it holds, and reads it when told to."""
    state = {f'backbone.{k}': v for k, v in OverLoCK(TINY).state_dict().items()}
    content = dict(state_dict=state, extra=pathlib.PurePosixPath('a'))
    torch.save(content, demo_data / 'path.pth')
    convert = [*tool('convert_checkpoint.py'), 'path.pth', 'trusted.pth']
    fails(convert, demo_data, 'holds pathlib.', 'trust')
    run([*convert, '--trust'], demo_data)
    deploy = [*tool('deploy_checkpoint.py'), configs / 'segmentor.py', 'path.pth', 'd.pth']
    trusted = run([*deploy, '--trust'], demo_data, status=2).stderr
    assert 'missing from the file: decode_head.' in trusted


def test_detector_pictures_and_predictions(detector, configs, demo_data):
    run(
        [
            *tool('test.py'),
            configs / 'detector.py',
            detector / 'epoch_1.pth',
            '--work-dir',
            'det_test',
            '--show-dir',
            'det_pictures',
            '--out',
            'det.pkl',
            '--cfg-options',
            'model.test_cfg.rcnn.score_thr=0.0',
        ],
        demo_data,
    )
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= set(metrics_in(demo_data / 'det_test'))
    assert len(list((demo_data / 'det_pictures').rglob('*.png'))) == 2
    predictions = pickle.loads((demo_data / 'det.pkl').read_bytes())
    assert len(predictions) == 2 and 'masks' in predictions[0]['pred_instances']


def test_detector_augmented(detector, configs, demo_data):
    result = run(
        [
            *tool('test.py'),
            configs / 'detector.py',
            detector / 'epoch_1.pth',
            '--work-dir',
            'det_tta',
            '--tta',
            '--cfg-options',
            'model.test_cfg.rcnn.score_thr=0.0',
        ],
        demo_data,
    )
    assert 'masks are left out' in result.stdout
    metrics = metrics_in(demo_data / 'det_tta')
    assert 'coco/bbox_mAP' in metrics and 'coco/segm_mAP' not in metrics


def fails(command, cwd, *words):
    """The command ends with status 2 and one line that holds the words."""
    result = run(command, cwd, status=2)
    assert result.stderr.count('\n') == 1 and result.stderr.startswith('error: '), (
        result.stderr
    )
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize(
    'config, words',
    [
        (
            'segmentation/upernet_overlock_t.py',
            [
                'data/ade/ADEChallengeData2016/images/training does not exist',
                'annotations/validation',
                'ADEChallengeData2016.zip',
                'link it',
            ],
        ),
        (
            'detection/mask_rcnn_overlock_t_1x.py',
            [
                'data/coco/annotations/instances_train2017.json does not exist',
                'data/coco/val2017',
                'cocodataset.org',
                'link it',
            ],
        ),
        (
            'segmentation/upernet_overlock_xt_demo.py',
            ['data/demo/images/training does not exist', 'make_demo_data.py'],
        ),
    ],
)
def test_missing_dataset(tmp_path, config, words):
    fails([*tool('train.py'), ROOT / 'configs' / config], tmp_path, *words)


def test_missing_config(tmp_path):
    fails(
        [*tool('train.py'), ROOT / 'configs/segmentation/upernet_overlock_x.py'],
        tmp_path,
        'upernet_overlock_x.py does not exist',
        'upernet_overlock_xt.py',
    )
    fails([*tool('test.py'), 'none.py', 'none.pth'], tmp_path, 'none.py does not exist')


def test_pretrained_weights(configs, demo_data):
    """They are needed when the config names them, and not with --no-pretrained."""
    train = [*tool('train.py'), configs / 'segmentor.py', '--work-dir', 'pretrained']
    options = [
        '--cfg-options',
        'model.backbone.init_cfg.type=Pretrained',
        'model.backbone.init_cfg.checkpoint=http://127.0.0.1:9/weights.pth',
        'train_cfg.max_iters=1',
        'train_cfg.val_interval=1',
    ]
    result = run([*train, *options], demo_data, status=2)
    # the toolbox warns of this and that while it builds the model
    assert 'Traceback' not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith('error: ') and 'cannot be downloaded' in line
    assert '--no-pretrained' in line
    run([*train, '--no-pretrained', *options], demo_data)


def test_a_checkpoint_replaces_pretrained_weights(segmentor, configs, demo_data):
    """These need not be there when load_from brings all weights."""
    train = [*tool('train.py'), configs / 'segmentor.py', '--work-dir', 'loaded']
    options = [
        '--cfg-options',
        'model.backbone.init_cfg.type=Pretrained',
        'model.backbone.init_cfg.checkpoint=none.pth',
        'train_cfg.max_iters=1',
        'train_cfg.val_interval=1',
    ]
    run([*train, *options, f'load_from={segmentor / "iter_6.pth"}'], demo_data)


def test_pretrained_weights_of_a_config():
    pretrained = dict(type='Pretrained', checkpoint='w.pth')
    constant = dict(type='Constant', val=0)
    scoped = dict(type='mmengine.Pretrained', checkpoint='w.pth')
    model = dict(a=dict(init_cfg=[constant, pretrained]), b=[dict(init_cfg=scoped)])
    model['init_cfg'] = dict(pretrained, type=PretrainedInit)
    cli.without_pretrained(model)
    assert model == dict(
        a=dict(init_cfg=[constant]), b=[dict(init_cfg=None)], init_cfg=None
    )


def test_loading_options():
    hook = dict(type='StrictLoadingHook')
    assert cli.loading_options(Config()) == hook
    cfg = Config(dict(default_hooks=dict(loading=dict(trust=True))))
    assert cli.loading_options(cfg) == dict(hook, trust=True)
    assert cfg.default_hooks.loading.type == 'StrictLoadingHook'


def test_missing_checkpoint(tmp_path):
    fails([*tool('test.py'), SEGMENTATION, 'none.pth'], tmp_path, 'none.pth does not exist')
    fails(
        [*tool('train.py'), SEGMENTATION, '--resume', 'none.pth'],
        tmp_path,
        'none.pth does not exist',
    )


def test_mixed_precision_without_a_gpu(tmp_path):
    fails([*tool('train.py'), SEGMENTATION, '--amp'], tmp_path, '--amp needs a GPU')


@pytest.mark.parametrize(
    'absent, config, words',
    [
        ('mmengine', SEGMENTATION, ['mmengine is not installed', 'pip install -e']),
        ('mmcv', SEGMENTATION, ['mmcv is not installed', 'pip install', 'onedl-mmcv']),
        (
            'mmseg',
            SEGMENTATION,
            ['MMSegmentation is not installed', 'onedl-mmsegmentation'],
        ),
        ('mmdet', DETECTION, ['MMDetection is not installed', 'onedl-mmdetection']),
        ('ftfy', SEGMENTATION, ['MMSegmentation needs ftfy', 'pip install ftfy']),
        ('mmcv._ext', DETECTION, ['without its compiled ops', 'MMCV_WITH_OPS=1']),
    ],
)
@pytest.mark.parametrize('name', ['train.py', 'test.py'])
def test_missing_toolbox(tmp_path, absent, config, words, name):
    code = f"""
import runpy, sys
sys.modules[{absent!r}] = None  # what import does for a package that is not there
sys.argv = [{name!r}, {str(config)!r}, *(['x.pth'] if {name!r} == 'test.py' else [])]
runpy.run_path({str(ROOT / 'tools' / name)!r}, run_name='__main__')
"""
    fails([sys.executable, '-c', code], tmp_path, *words)


def test_auto_scaled_learning_rate(configs, demo_data):
    run(
        [
            *tool('train.py'),
            configs / 'segmentor.py',
            '--work-dir',
            'scaled',
            '--auto-scale-lr',
            '--cfg-options',
            'train_cfg.max_iters=1',
            'train_cfg.val_interval=1',
        ],
        demo_data,
    )
    (log,) = (demo_data / 'scaled').glob('*/vis_data/scalars.json')
    first = json.loads(log.read_text().splitlines()[0])
    cfg = Config.fromfile(SEGMENTATION)
    # 2 images a step where the rates are for 16, at the start of the warm-up
    expected = cfg.optim_wrapper.optimizer.lr * cfg.param_scheduler[0].start_factor * 2 / 16
    assert first['lr'] == pytest.approx(expected)
