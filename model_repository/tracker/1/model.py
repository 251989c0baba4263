from ensemble.backend import SequenceModel, TritonMetrics
from ensemble.components import components, propagation
from ensemble.metrics import TRACK_METRICS
from ensemble.tracker import Limits, Tracker
from export.runners import open_device, open_graphs, warm_up


class TritonPythonModel(SequenceModel):
    server: Tracker

    def open_server(self) -> Tracker:
        self.endpoint = TritonMetrics(TRACK_METRICS)
        graphs = open_graphs(self.settings, self.folder, components(self.config)["tracker"].parts, self.config)
        self.device = open_device(self.settings)
        tracker = Tracker(self.config, graphs, self.device, Limits.from_parameters(self.settings, self.triton_idle_s))
        warm_up(tracker.propagation, propagation(self.config))
        return tracker

    def finalize(self) -> None:
        super().finalize()
        del self.endpoint  # figures that outlive the interpreter end the process with a fault

    def sweep(self) -> None:
        super().sweep()
        with self.lock:
            taken = self.server.metrics.take()
        self.endpoint.pass_on(taken)
