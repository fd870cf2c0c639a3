// Replaces containerd's pkg/sys/oom_linux.go in gVisor's shim. The original insists on lowering oom_score_adj, which is refused
// where CAP_SYS_RESOURCE is missing (containers, many VMs); this one tolerates the refusal and changes nothing else.

package sys

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
)

const (
	OOMScoreAdjMin = -1000
	OOMScoreAdjMax = 1000
)

func path(pid int) string { return fmt.Sprintf("/proc/%d/oom_score_adj", pid) }

func AdjustOOMScore(pid, score int) error {
	return SetOOMScore(pid, max(OOMScoreAdjMin, min(OOMScoreAdjMax, score)))
}

func SetOOMScore(pid, score int) error {
	err := os.WriteFile(path(pid), []byte(strconv.Itoa(score)), 0)
	if errors.Is(err, fs.ErrPermission) {
		return nil
	}
	return err
}

func GetOOMScoreAdj(pid int) (int, error) {
	b, err := os.ReadFile(path(pid))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}
