"""What a run of mmengine wrote is read without trust, and resumed as if never stopped."""

import copy

import mmdet.engine.schedulers  # noqa: F401
import mmseg.engine.schedulers  # noqa: F401
import numpy as np
import pytest
import torch
from mmdet.registry import PARAM_SCHEDULERS as DETECTION
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import Runner
from mmseg.registry import PARAM_SCHEDULERS as SEGMENTATION
from torch import nn

from overlock_mm.checkpoint import read_weights, write_weights
from overlock_mm.hooks import StrictLoadingHook

# Options of every kind of stock schedule.
OPTIONS = dict(
    Constant=dict(factor=0.5, end=3),
    CosineAnnealing=dict(T_max=4),
    CosineRestart=dict(periods=[2, 3], restart_weights=[1, 0.5], eta_min=0.01),
    Exponential=dict(gamma=0.9),
    Linear=dict(start_factor=0.1, end=3),
    MultiStep=dict(milestones=[1, 3]),
    OneCycle=dict(eta_max=0.5, total_steps=6),
    Poly=dict(power=0.9, end=4),
    QuadraticWarmup=dict(end=3),
    ReduceOnPlateau=dict(monitor='score', patience=0, by_epoch=True),
    Step=dict(step_size=2),
    PolyRatio=dict(eta_min_ratio=0.01, end=4),
)
SCHEDULES = [
    name
    for registry in (PARAM_SCHEDULERS, DETECTION, SEGMENTATION)
    for name in registry.module_dict
    if not name.endswith('ParamScheduler')
]
SGD = dict(type='SGD', lr=0.1, momentum=0.9)


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(1, 1)
        self.second = nn.Linear(1, 1)

    def forward(self, inputs, mode='loss'):
        outputs = self.second(self.first(inputs))
        return dict(loss=outputs.square().mean()) if mode == 'loss' else [outputs]


class Adversarial(Model):
    """Trained by several optimizers, as in adversarial training."""

    def train_step(self, data, optim_wrapper):
        for wrapper in optim_wrapper.values():
            self.zero_grad()  # of what the other one trains
            wrapper.update_params(self(**data)['loss'])
        return dict(loss=torch.ones(()))


class Numbers(torch.utils.data.Dataset):
    def __init__(self, metainfo=None):
        self.metainfo = metainfo or dict(classes=('a', 'b'))

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.full((1,), index / 12)


class Score(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(score=0.5)


class Recorded(Hook):
    """Keeps what the schedules have set, iteration by iteration."""

    priority = 'LOWEST'

    def __init__(self):
        self.values = []

    def after_train_iter(self, runner, *args, **kwargs):
        groups = runner.optim_wrapper.param_groups
        if isinstance(groups, dict):
            groups = [g for name in sorted(groups) for g in groups[name]]
        keys = ('lr', 'momentum', 'betas')
        self.values.append([g[k] for g in groups for k in keys if k in g])


@pytest.fixture(autouse=True)
def no_search_for_compilers(monkeypatch):
    """Runners log what is installed, which takes seconds."""
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)


def collate(batch):
    return dict(inputs=torch.stack(batch))


def train(folder, iters, load_from=None, model=Model, hooks=(), wrapper=None, **options):
    """Train up to an iteration, from the beginning or from a checkpoint."""
    torch.manual_seed(0)
    loader = dict(
        dataset=Numbers(options.pop('metainfo', None)),
        sampler=dict(type='DefaultSampler', shuffle=False),
        batch_size=2,
        collate_fn=collate,
    )
    recorded = Recorded()
    runner = Runner(
        model(),
        str(folder),
        train_dataloader=loader,
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iters, val_interval=3),
        val_dataloader=copy.deepcopy(loader),
        val_cfg=dict(type='ValLoop'),
        val_evaluator=dict(type=Score),
        optim_wrapper=wrapper or dict(type='OptimWrapper', optimizer=SGD),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=2, by_epoch=False),
            loading=dict(type=StrictLoadingHook),
        ),
        custom_hooks=[recorded, *copy.deepcopy(list(hooks))],
        load_from=load_from and str(load_from),
        resume=bool(load_from),
        cfg=Config(dict(model=dict(type='Model'))),
        log_level='ERROR',
        **options,
    )
    runner.train()
    return runner, recorded.values


def check_resumed(folder, **options):
    """Resume from the middle of a run, and compare with the rest of it."""
    whole, expected = train(folder / 'whole', 4, **copy.deepcopy(options))
    file = folder / 'whole' / 'iter_2.pth'
    content = read_weights(file)
    resumed, values = train(folder / 'resumed', 4, file, **copy.deepcopy(options))
    assert len(expected) == 4 and values == expected[2:]
    torch.testing.assert_close(
        resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0
    )
    return content


def schedule(name, **options):
    kind = name.removesuffix('LRRatio') + 'Ratio' if name.endswith('Ratio') else name
    kind = kind.removesuffix('LR').removesuffix('Momentum')
    scope = next(
        s
        for s, r in dict(
            mmengine=PARAM_SCHEDULERS, mmdet=DETECTION, mmseg=SEGMENTATION
        ).items()
        if name in r.module_dict
    )
    return dict(
        dict(by_epoch=False, **OPTIONS[kind])
        if 'by_epoch' not in OPTIONS[kind]
        else OPTIONS[kind],
        type=f'{scope}.{name}',
        **options,
    )


@pytest.mark.parametrize('name', SCHEDULES)
def test_schedules(tmp_path, name):
    content = check_resumed(tmp_path, param_scheduler=schedule(name))
    (saved,) = content['param_schedulers']
    assert 'last_step' in saved


def test_linear_annealing(tmp_path):
    """The function that is saved is another one."""
    given = schedule('OneCycleLR', anneal_strategy='linear', three_phase=True)
    content = check_resumed(tmp_path, param_scheduler=given)
    saved = content['param_schedulers'][0]['anneal_func']
    assert saved.__qualname__ == 'OneCycleParamScheduler._annealing_linear'


def test_several_schedules(tmp_path):
    names = ('LinearLR', 'MultiStepLR', 'CosineAnnealingMomentum')
    check_resumed(tmp_path, param_scheduler=[schedule(name) for name in names])


@pytest.mark.parametrize(
    'hook',
    [
        dict(type='EMAHook'),
        dict(type='EMAHook', ema_type='StochasticWeightAverage', update_buffers=True),
        dict(type='EarlyStoppingHook', monitor='score', rule='greater', patience=9),
        dict(type='ProfilerHook', by_epoch=False, profile_times=1),
        dict(type='SyncBuffersHook'),
        dict(type='EmptyCacheHook'),
        dict(type='mmdet.CheckInvalidLossHook', interval=1),
        dict(type='mmdet.SetEpochInfoHook'),
        dict(
            type='CheckpointHook',
            interval=1,
            by_epoch=False,
            save_best='score',
            rule='less',
        ),
    ],
    ids=lambda hook: hook['type'],
)
def test_hooks(tmp_path, hook):
    import mmdet.engine.hooks  # noqa: F401

    if hook['type'] == 'mmdet.SetEpochInfoHook':

        class Counting(Model):
            def set_epoch(self, epoch):
                pass

        check_resumed(tmp_path, hooks=[hook], model=Counting)
        return
    check_resumed(tmp_path, hooks=[hook])


@pytest.mark.parametrize(
    'wrapper',
    [
        dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.1)),
        dict(
            type='OptimWrapper',
            optimizer=SGD,
            accumulative_counts=2,
            clip_grad=dict(max_norm=1.0),
        ),
        dict(
            type='OptimWrapper',
            optimizer=SGD,
            paramwise_cfg=dict(custom_keys={'first': dict(lr_mult=0.1)}),
        ),
        dict(type='OptimWrapper', optimizer=dict(type='Adadelta', lr=1.0)),
        dict(type='OptimWrapper', optimizer=dict(type='RAdam', lr=0.1)),
        dict(type='OptimWrapper', optimizer=dict(type='Rprop', lr=0.1)),
    ],
    ids=['adamw', 'accumulated', 'layerwise', 'adadelta', 'radam', 'rprop'],
)
def test_optimizers(tmp_path, wrapper):
    check_resumed(tmp_path, wrapper=wrapper, param_scheduler=schedule('LinearLR'))


def test_several_optimizers(tmp_path):
    class Built:
        """mmengine builds several optimizers only from a constructor of the user's."""

        def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
            pass

        def __call__(self, model):
            return OptimWrapperDict(
                first=OptimWrapper(torch.optim.SGD(model.first.parameters(), 0.1)),
                second=OptimWrapper(torch.optim.Adam(model.second.parameters(), 0.1)),
            )

    from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS

    OPTIM_WRAPPER_CONSTRUCTORS.register_module(name='Built', module=Built, force=True)
    wrapper = dict(constructor='Built')
    schedules = dict(first=[schedule('OneCycleLR')], second=[schedule('MultiStepLR')])
    for given in (schedules, [schedule('LinearLR')]):
        content = check_resumed(
            tmp_path / str(len(given)),
            wrapper=wrapper,
            model=Adversarial,
            param_scheduler=given,
        )
        assert set(content['optimizer']) == {'first', 'second'}


@pytest.mark.dev_stack
def test_loss_scaling(tmp_path):
    """What AmpOptimWrapper saves of its scaler; it cannot be built without a GPU."""
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
    loss = scaler.scale(nn.Linear(1, 1)(torch.ones(1, 1)).sum())
    loss.backward()
    torch.save(dict(optimizer=dict(loss_scaler=scaler.state_dict())), tmp_path / 'w.pth')
    read = read_weights(tmp_path / 'w.pth')['optimizer']['loss_scaler']
    assert read == scaler.state_dict() and read['scale'] == 4.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='mixed precision needs a GPU')
def test_mixed_precision(tmp_path):
    wrapper = dict(type='AmpOptimWrapper', optimizer=SGD, loss_scale='dynamic')
    content = check_resumed(tmp_path, wrapper=wrapper)
    assert content['optimizer']['loss_scaler']['scale'] > 1


METAINFO = dict(
    classes=('a', 'b'),
    palette=np.array([[0, 0, 0], [9, 9, 9]], np.uint8),
    names=np.array(['a', 'bc']),
    mixed=np.array(['a', None, 3], dtype=object),
    nested=ConfigDict(ignore=[255], more=dict(scale=(1.0, 2.0), inf=float('inf'))),
    config=Config(dict(a=dict(b=1))),
    groups={'a', 'b'},
    mean=np.float32(0.5),
    dtype=torch.float32,
)


def test_metainfo(tmp_path):
    content = check_resumed(tmp_path, metainfo=METAINFO)
    read = content['meta']['dataset_meta']
    assert read.keys() == METAINFO.keys()
    for key in ('palette', 'names', 'mixed'):
        assert read[key].dtype == METAINFO[key].dtype
        assert read[key].tolist() == METAINFO[key].tolist()
    assert type(read['nested']) is ConfigDict and read['nested'] == METAINFO['nested']
    assert read['config'].a.b == 1 and isinstance(read['config'], Config)
    for key in ('classes', 'groups', 'mean', 'dtype'):
        assert read[key] == METAINFO[key] and type(read[key]) is type(METAINFO[key])
    write_weights(dict(meta=content['meta'], state_dict={}), tmp_path / 'again.pth')
    again = read_weights(tmp_path / 'again.pth')['meta']['dataset_meta']
    assert again['nested'] == METAINFO['nested']


def test_logged_values(tmp_path):
    """Statistics are read as mmengine's own, whatever the file says they are."""
    content = check_resumed(tmp_path)
    logged = content['message_hub']['log_scalars']['train/loss']
    assert isinstance(logged, HistoryBuffer) and logged.mean() > 0
    buffer = HistoryBuffer([1.0, 5.0], [1, 1])
    buffer.__dict__['statistics_methods'] = {'mean': HistoryBuffer.max}
    buffer._statistics_methods = {'mean': HistoryBuffer.max}
    torch.save(dict(buffer=buffer), tmp_path / 'w.pth')
    read = read_weights(tmp_path / 'w.pth')['buffer']
    assert HistoryBuffer._statistics_methods['mean'] is HistoryBuffer.mean
    assert read.mean() == 3.0
