// Command gitops checks how GitOps tools read the objects of a snapshot: Flux with its kstatus library, and Argo CD with the health check
// in config/argocd, which runs in the same sandbox as in Argo CD. Both tools must report the health that the snapshot expects.
//
// usage: gitops SNAPSHOT ARGOCD-CM
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"github.com/fluxcd/cli-utils/pkg/kstatus/status"
	lua "github.com/yuin/gopher-lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

// phase is one object, with the health that Argo CD and Flux should report, and the text that both should show beside it.
type phase struct {
	Case   string                    `json:"case"`
	Argo   string                    `json:"argo"`
	Flux   string                    `json:"flux"`
	Says   string                    `json:"says"`
	Object unstructured.Unstructured `json:"object"`
}

func main() {
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(snapshot, configMap string) error {
	phases, err := read(snapshot)
	if err != nil {
		return err
	}
	var checks struct{ Data map[string]string }
	text, err := os.ReadFile(configMap)
	if err != nil {
		return err
	}
	if err := yaml.Unmarshal(text, &checks); err != nil {
		return fmt.Errorf("%s: %w", configMap, err)
	}
	passed, failed := 0, 0
	expect := func(what, expected, found string, err error) {
		switch {
		case err != nil:
			failed++
			fmt.Printf("FAILED  %s: %v\n", what, err)
		case expected != found:
			failed++
			fmt.Printf("FAILED  %s: expected %s, found %s\n", what, expected, found)
		default:
			passed++
		}
	}
	says := func(what, expected, found string) {
		if !strings.Contains(found, expected) {
			failed++
			fmt.Printf("FAILED  %s: expected a message with %q, found %q\n", what, expected, found)
		}
	}
	for _, one := range phases {
		object := &one.Object
		what := object.GetKind() + " " + one.Case
		found, message, err := flux(object)
		expect("Flux, "+what, one.Flux, found, err)
		says("Flux, "+what, one.Says, message)
		found, message, err = argo(object, checks.Data["resource.customizations.health.belay.dev_"+object.GetKind()])
		expect("Argo CD, "+what, one.Argo, found, err)
		says("Argo CD, "+what, one.Says, message)
	}
	fmt.Printf("%d passed, %d failed\n", passed, failed)
	if failed > 0 || passed == 0 {
		return fmt.Errorf("not every object is to Flux and Argo CD what it is to a person")
	}
	return nil
}

// read returns the objects of the snapshot. The text before the second line of dashes is the header that insta writes.
func read(path string) ([]phase, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	parts := strings.SplitN(string(text), "---\n", 3)
	var phases []phase
	if err := json.Unmarshal([]byte(parts[len(parts)-1]), &phases); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return phases, nil
}

// flux returns the status that kstatus computes for an object, and its message.
func flux(object *unstructured.Unstructured) (string, string, error) {
	result, err := status.Compute(object)
	if err != nil {
		return "", "", err
	}
	return result.Status.String(), result.Message, nil
}

// argo runs a health check as Argo CD's util/lua does: with the libraries package, base and table only, the object as the global `obj`, and
// a table with a status and a message as the answer. For an object that is being deleted, Argo CD reports Progressing, whatever the check
// says.
func argo(object *unstructured.Unstructured, check string) (string, string, error) {
	if object.GetDeletionTimestamp() != nil {
		return "Progressing", "", nil
	}
	if check == "" {
		return "", "", fmt.Errorf("no health check for kind %s", object.GetKind())
	}
	machine := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer machine.Close()
	for name, open := range map[string]lua.LGFunction{lua.LoadLibName: lua.OpenPackage, lua.BaseLibName: lua.OpenBase, lua.TabLibName: lua.OpenTable} {
		if err := machine.CallByParam(lua.P{Fn: machine.NewFunction(open), NRet: 0, Protect: true}, lua.LString(name)); err != nil {
			return "", "", err
		}
	}
	machine.SetGlobal("obj", value(machine, object.Object))
	if err := machine.DoString(check); err != nil {
		return "", "", err
	}
	answer, ok := machine.Get(-1).(*lua.LTable)
	if !ok {
		return "", "", fmt.Errorf("expected a table, found %s", machine.Get(-1).Type())
	}
	return answer.RawGetString("status").String(), answer.RawGetString("message").String(), nil
}

// value converts a JSON value to a Lua value.
func value(machine *lua.LState, of any) lua.LValue {
	switch of := of.(type) {
	case map[string]any:
		table := machine.NewTable()
		for name, member := range of {
			table.RawSetString(name, value(machine, member))
		}
		return table
	case []any:
		table := machine.NewTable()
		for _, item := range of {
			table.Append(value(machine, item))
		}
		return table
	case string:
		return lua.LString(of)
	case bool:
		return lua.LBool(of)
	case int64:
		return lua.LNumber(of)
	default:
		return lua.LNil
	}
}
