// tessera FOLDER ENTRIES CALLERS: has Tessera's POSIX driver keep the lines of ENTRIES in FOLDER, and prints what it took.
//
// So many callers at a time take two lines each: the first one they add and wait until it is integrated, the second one they add and do not
// wait for. A batch goes as soon as there is something of every caller, or after a few milliseconds, which is what makes it fastest.
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/storage/posix"
	"golang.org/x/mod/sumdb/note"
	"k8s.io/klog/v2"
)

func processor() float64 {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		log.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano()).Seconds()
}

func main() {
	klog.InitFlags(nil)
	flag.Parse()
	klog.SetOutput(io.Discard)
	text, err := os.ReadFile(flag.Arg(1))
	if err != nil {
		log.Fatal(err)
	}
	entries := bytes.Split(text, []byte("\n"))
	callers, err := strconv.Atoi(flag.Arg(2))
	if err != nil {
		log.Fatal(err)
	}
	secret, _, err := note.GenerateKey(rand.Reader, "belay.dev/bench")
	if err != nil {
		log.Fatal(err)
	}
	signer, err := note.NewSigner(secret)
	if err != nil {
		log.Fatal(err)
	}
	ctx := context.Background()
	driver, err := posix.New(ctx, posix.Config{Path: flag.Arg(0)})
	if err != nil {
		log.Fatal(err)
	}
	appender, shutdown, _, err := tessera.NewAppender(ctx, driver, tessera.NewAppendOptions().
		WithCheckpointSigner(signer).
		WithCheckpointInterval(time.Second).
		WithBatching(uint(2*callers), 5*time.Millisecond))
	if err != nil {
		log.Fatal(err)
	}

	busy, started := processor(), time.Now()
	var next atomic.Int64
	var group sync.WaitGroup
	waits := make([][]float64, callers)
	for caller := range callers {
		group.Go(func() {
			var last tessera.IndexFuture
			for {
				at := int(next.Add(2)) - 2
				if at+1 >= len(entries) {
					break
				}
				began := time.Now()
				if _, err := appender.Add(ctx, tessera.NewEntry(entries[at]))(); err != nil {
					log.Fatal(err)
				}
				waits[caller] = append(waits[caller], float64(time.Since(began).Microseconds())/1e3)
				last = appender.Add(ctx, tessera.NewEntry(entries[at+1]))
			}
			if last != nil {
				if _, err := last(); err != nil {
					log.Fatal(err)
				}
			}
		})
	}
	group.Wait()
	took := map[string]any{"seconds": time.Since(started).Seconds(), "processor": processor() - busy}
	var all []float64
	for _, of := range waits {
		all = append(all, of...)
	}
	took["waits"] = all
	if err := shutdown(ctx); err != nil {
		log.Fatal(err)
	}
	out, err := json.Marshal(took)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(out))
}
